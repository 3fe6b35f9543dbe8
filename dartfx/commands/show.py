"""``python -m dartfx show``: the vision tokens that were kept, drawn over the image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dartfx
from dartfx.commands.loading import CommandError, add_arguments, load, options
from dartfx.kept import KeptTokens
from dartfx.layout import Layout, layout_of, merged

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_arguments(parser)
    parser.add_argument(
        "--grid",
        help="how the tokens lie, as 24x24 or frames as 8x12x16 (default: from the inputs)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kept.png"), help="a .png or .html file (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the picture; returns 1 when nothing was pruned, 2 when something is missing."""
    try:
        layout = None if arguments.grid is None else _grid(arguments.grid)
        if arguments.out.suffix not in (".png", ".html"):
            raise CommandError(f"--out must end in .png or .html, got {str(arguments.out)!r}")
        model, inputs = load(arguments)
        found = dartfx.explain(
            model.generate, options=options(arguments), tokens=True, max_new_tokens=1,
            do_sample=False, **inputs,
        )  # fmt: skip
        if not found.tokens:
            print(found, file=sys.stderr)
            return 1
        (kept, *_) = _whole(layout, inputs, found.tokens)
        _write(arguments, kept)
    except (CommandError, dartfx.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(kept)
    print(f"wrote {arguments.out}")
    return 0


def _grid(text: str) -> Layout:
    try:
        return layout_of([int(part) for part in text.split("x")])
    except ValueError as error:
        raise CommandError(f"--grid is like 24x24 or 8x12x16, got {text!r}") from error


def _whole(
    layout: Layout | None, inputs: Mapping[str, Any], tokens: tuple[KeptTokens, ...]
) -> list[KeptTokens]:
    """The image's record with its layout: given, from the processor's patch grid, or a square."""
    grid = next((v for k, v in inputs.items() if k.endswith("_grid_thw")), None)
    if layout is None and grid is not None:
        layout = merged(grid[0].tolist(), sum(len(k.positions) for k in tokens))
    return list(tokens) if layout is None else dartfx.kept_tokens([layout])


def _write(arguments: argparse.Namespace, kept: KeptTokens) -> None:
    try:
        if arguments.out.suffix == ".html":
            arguments.out.write_text(dartfx.overlay_html(arguments.image, kept))
        else:
            dartfx.overlay(arguments.image, kept).save(arguments.out)
    except ValueError as error:
        raise CommandError(f"{error}; give --grid") from error
