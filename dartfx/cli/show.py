"""``python -m dartfx show``: the vision tokens that were kept, drawn over the image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path

import dartfx
from dartfx.cli.arguments import add_model, load, options
from dartfx.errors import InputError
from dartfx.integrations.hf import quiet_dynamo
from dartfx.integrations.outputs import check_file
from dartfx.token_map.kept_tokens import KeptTokens
from dartfx.token_map.layout import Layout, layout_of

__all__ = ["configure", "run"]

_OPTIONS = "give their layout by --grid, --tiles or --anyres"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_model(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--grid",
        help="the grid of tokens, as 24x24 or frames as 8x12x16 (default: from the inputs)",
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
    """Write the picture; 1 when nothing was pruned.  Raises InputError."""
    option, layout = _named(arguments)
    if arguments.out.suffix not in (".png", ".html"):
        raise InputError("out", f"{str(arguments.out)!r} must end in .png or .html")
    check_file("out", arguments.out)
    model, inputs = load(arguments)
    quiet_dynamo()
    explanation = dartfx.explain(
        model.generate, options=options(arguments), tokens=True, max_new_tokens=1,
        do_sample=False, **inputs,
    )  # fmt: skip
    if not explanation.tokens:
        print(explanation, file=sys.stderr)
        return 1
    (kept, *_) = explanation.tokens
    if layout is not None:
        tokens = sum(len(k.positions) for k in explanation.tokens)
        with _blaming(option):
            (kept,) = dartfx.kept_tokens([layout(tokens)])
    elif kept.layout is None:
        note = next(
            iter(explanation.notes), "NOTE: the tokens do not form a square; name the layout"
        )
        raise InputError("image", f"{note.removeprefix('NOTE: ')}: {_OPTIONS}")
    with _blaming(option):
        _write(arguments, kept)
    print(kept)
    print(f"wrote {arguments.out}")
    return 0


@contextmanager
def _blaming(option: str) -> Iterator[None]:
    """Attribute a layout that does not fit the tokens to the option that gave it."""
    try:
        yield
    except ValueError as error:
        raise InputError(option, f"{error}: {_OPTIONS}") from error


def _named(arguments: argparse.Namespace) -> tuple[str, Callable[[int], Layout] | None]:
    """The option that gives a layout, and the layout by the number of vision tokens."""
    if arguments.grid is not None:
        grid = _numbers("grid", arguments.grid, (2, 3), "24x24 or 8x12x16")
        return "grid", lambda tokens: layout_of(grid)
    if arguments.tiles is not None:
        rows, columns = _numbers("tiles", arguments.tiles, (2,), "2x3")
        overview = None if arguments.overview == "none" else arguments.overview

        def tiles(tokens: int) -> Layout:
            side = isqrt(tokens // (rows * columns + (overview is not None)))
            return Layout.tiles(rows, columns, (side, side), overview)

        return "tiles", tiles
    if arguments.anyres is not None:
        high, wide = _numbers("anyres", arguments.anyres, (2,), "36x48")

        def anyres(tokens: int) -> Layout:
            side = isqrt(max(tokens - high * (wide + 1), 0))
            return Layout.anyres((side, side), (high, wide))

        return "anyres", anyres
    return "grid", None


def _numbers(option: str, text: str, counts: tuple[int, ...], example: str) -> list[int]:
    parts = text.split("x")
    if len(parts) not in counts or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(option, f"got {text!r}, not something like {example}")
    return [int(part) for part in parts]


def _write(arguments: argparse.Namespace, kept: KeptTokens) -> None:
    if arguments.out.suffix == ".html":
        arguments.out.write_text(dartfx.overlay_html(arguments.image, kept))
    else:
        dartfx.overlay(arguments.image, kept).save(arguments.out)
