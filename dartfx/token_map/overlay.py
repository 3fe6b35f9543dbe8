"""Kept vision tokens drawn over their image: dropped patches dimmed, colours and marks by pivot."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dartfx.token_map.kept_tokens import KeptTokens
from dartfx.token_map.layout import Cell, Layout, layout_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["overlay", "overlay_html"]

_WIDTH, _GAP = 672, 8
_DIM, _TINT = 0.78, 0.35  # of a dropped patch towards black; of a kept one towards its colour
Color = tuple[int, int, int]


@dataclass(frozen=True)
class _Patch:
    """One vision token on the picture: its rectangle, colour (None: dropped) and tooltip."""

    box: tuple[int, int, int, int]
    color: Color | None
    is_pivot: bool
    title: str


def overlay(
    image: Image | str | Path | Sequence[Any],
    kept: KeptTokens,
    grid: Layout | Sequence[int] | None = None,
) -> Image:
    """The image with dropped patches dimmed, kept ones in their pivot's colour, pivots framed.

    image: a Pillow image, a file, or a list of them for a video's frames.  kept: one image's entry
    of :func:`dartfx.kept_tokens`.  grid: (rows, columns), (frames, rows, columns) or a Layout;
    default: the record's own.  Views (overview and tiles, frames) are drawn side by side.  Raises
    ValueError when the grid does not fit the tokens, ImportError without Pillow.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    layout = _layout(kept, grid)
    picture = _canvas(image, layout)
    for patch in _patches(kept, layout, picture.size):
        left, top, right, bottom = patch.box
        if right <= left or bottom <= top:
            continue
        part = picture.crop(patch.box)
        towards = images.new("RGB", part.size, patch.color or (0, 0, 0))
        share = _DIM if patch.color is None else _TINT
        picture.paste(images.blend(part, towards, share), patch.box)
        if patch.is_pivot:
            pen = ImageDraw.Draw(picture)
            pen.rectangle((left, top, right - 1, bottom - 1), outline="white", width=2)
            pen.rectangle((left + 2, top + 2, right - 3, bottom - 3), outline=patch.color, width=1)
    return picture


def overlay_html(
    image: Image | str | Path | Sequence[Any],
    kept: KeptTokens,
    grid: Layout | Sequence[int] | None = None,
) -> str:
    """The same as a self-contained HTML page: hovering over a patch describes its token.

    Arguments and errors as of :func:`overlay`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    layout = _layout(kept, grid)
    picture = _canvas(image, layout)
    data = io.BytesIO()
    picture.save(data, "PNG")
    environment = Environment(
        loader=PackageLoader("dartfx.observe.html"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("tokens.html.jinja").render(
        kept=kept,
        size=picture.size,
        png=base64.b64encode(data.getvalue()).decode(),
        patches=list(_patches(kept, layout, picture.size)),
        dim=_DIM,
        tint=_TINT,
    )


def _layout(kept: KeptTokens, grid: Layout | Sequence[int] | None) -> Layout:
    kept.cells(grid)  # raises where tokens and grid do not fit
    found = kept.layout if grid is None else layout_of(grid)
    assert found is not None
    return found


def _canvas(image: Any, layout: Layout) -> Image:
    """Every view's picture side by side."""
    from PIL import Image as images

    given = image if isinstance(image, list | tuple) else [image]
    views = len(layout.views)
    # A token of a video covers several frames: the first of its share is shown.
    chosen = [given[view * len(given) // views] for view in range(views)]
    opened = [one if isinstance(one, images.Image) else images.open(one) for one in chosen]
    wide = _WIDTH if views < 3 else _WIDTH // 2
    high = round(wide * opened[0].height / opened[0].width)
    canvas = images.new("RGB", (views * (wide + _GAP) - _GAP, high), "white")
    for view, one in enumerate(opened):
        canvas.paste(one.convert("RGB").resize((wide, high)), (view * (wide + _GAP), 0))
    return canvas


def _patches(kept: KeptTokens, layout: Layout, size: tuple[int, int]) -> Iterator[_Patch]:
    picks = {i: number for number, pick in enumerate(kept.picks) for i in pick.kept}
    stays, pivots = set(kept.kept), set(kept.pivots)
    wide = (size[0] + _GAP) // len(layout.views) - _GAP
    for i, cell in enumerate(layout.cells):
        if cell is None:
            continue
        title = f"token {i}, row {cell.row}, column {cell.column}"
        color = None
        if i in stays:
            color = _color(picks.get(i), len(kept.picks))
            title += ", pivot" if i in pivots else ", kept"
            if i in picks and i not in pivots:
                pick = kept.picks[picks[i]]
                kind = "text" if pick.index is None else "image"
                title += f" by the {kind} pivot at position {pick.position}"
        else:
            title += ", dropped"
        yield _Patch(_box(cell, layout, wide, size[1]), color, i in pivots, title)


def _box(cell: Cell, layout: Layout, wide: int, high: int) -> tuple[int, int, int, int]:
    rows, columns = layout.views[cell.view]
    left = cell.view * (wide + _GAP)
    x0, x1 = (left + wide * c // columns for c in (cell.column, cell.column + 1))
    y0, y1 = (high * r // rows for r in (cell.row, cell.row + 1))
    return x0, y0, x1, y1


def _color(number: int | None, of: int) -> Color:
    """One hue per pivot; white for tokens that no pivot picked (another selector)."""
    if number is None:
        return 255, 255, 255
    red, green, blue = colorsys.hsv_to_rgb(number / of, 0.85, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
