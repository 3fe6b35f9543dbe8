"""``python -m dartfx show``: the vision tokens that were kept, drawn over the image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import dartfx
from dartfx.integrations.hf import CommandError, add_arguments, load, options
from dartfx.token_map.kept_tokens import KeptTokens
from dartfx.token_map.layout import Layout, layout_of

__all__ = ["configure", "run"]

_OPTIONS = "here by --grid, --tiles or --anyres"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--grid",
        help="how the tokens lie, as 24x24 or frames as 8x12x16 (default: from the inputs)",
    )
    form.add_argument("--tiles", help="rows and columns of square tiles, as 2x3")
    form.add_argument(
        "--anyres", help="rows and columns of tokens after a square overview, as 36x48; newlines"
    )
    parser.add_argument(
        "--overview",
        choices=("first", "last", "none"),
        default="last",
        help="with --tiles: where one more tile shows the whole image (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("kept.png"), help="a .png or .html file (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the picture; returns 1 when nothing was pruned, 2 when something is missing."""
    try:
        layout = _named(arguments)
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
        (kept, *_) = found.tokens
        if layout is not None:
            (kept,) = dartfx.kept_tokens([layout(sum(len(k.positions) for k in found.tokens))])
        elif kept.layout is None:
            told = found.notes[0] if found.notes else "NOTE: the tokens make no square; name it"
            raise CommandError(f"{told.removeprefix('NOTE: ')}: {_OPTIONS}")
        _write(arguments, kept)
    except (CommandError, dartfx.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(kept)
    print(f"wrote {arguments.out}")
    return 0


def _named(arguments: argparse.Namespace) -> Callable[[int], Layout] | None:
    """The layout that the options name, as a function of the number of vision tokens."""
    if arguments.grid is not None:
        grid = _numbers("--grid", arguments.grid, (2, 3), "24x24 or 8x12x16")
        return lambda tokens: layout_of(grid)
    if arguments.tiles is not None:
        rows, columns = _numbers("--tiles", arguments.tiles, (2,), "2x3")
        overview = None if arguments.overview == "none" else arguments.overview

        def tiles(tokens: int) -> Layout:
            side = isqrt(tokens // (rows * columns + (overview is not None)))
            return Layout.tiles(rows, columns, (side, side), overview)

        return tiles
    if arguments.anyres is not None:
        high, wide = _numbers("--anyres", arguments.anyres, (2,), "36x48")

        def anyres(tokens: int) -> Layout:
            side = isqrt(max(tokens - high * (wide + 1), 0))
            return Layout.anyres((side, side), (high, wide))

        return anyres
    return None


def _numbers(option: str, text: str, counts: tuple[int, ...], example: str) -> list[int]:
    parts = text.split("x")
    if len(parts) not in counts or not all(part.isdecimal() and int(part) for part in parts):
        raise CommandError(f"{option} is like {example}, got {text!r}")
    return [int(part) for part in parts]


def _write(arguments: argparse.Namespace, kept: KeptTokens) -> None:
    try:
        if arguments.out.suffix == ".html":
            arguments.out.write_text(dartfx.overlay_html(arguments.image, kept))
        else:
            dartfx.overlay(arguments.image, kept).save(arguments.out)
    except ValueError as error:
        raise CommandError(f"{error}: {_OPTIONS}") from error
