"""The positions of vision tokens in their image: grids, tiles, frames.

A layout lists one cell per vision token, in prompt order.  Models order tokens
differently; :mod:`dartfx.token_map.infer_layout` infers the layout where a call's arguments
determine it, else a caller names it.  There is no model-specific code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

__all__ = ["Cell", "Layout", "Tiling", "layout_of", "merged"]


@dataclass(frozen=True)
class Cell:
    """One token's cell: the view of the picture (a frame, the overview), its row and column."""

    view: int
    row: int
    column: int


@dataclass(frozen=True)
class Tiling:
    """How a view is cut into tiles.

    grid: rows and columns of tiles.  tile: rows and columns of each, in tokens.  cut: rows and
    columns of padding that were taken off in front of the view's first token.
    """

    view: int
    grid: tuple[int, int]
    tile: tuple[int, int]
    cut: tuple[int, int] = (0, 0)

    def of(self, cell: Cell) -> int | None:
        """The number of the cell's tile, row by row; None in another view."""
        if cell.view != self.view:
            return None
        row, column = cell.row + self.cut[0], cell.column + self.cut[1]
        return row // self.tile[0] * self.grid[1] + column // self.tile[1]


@dataclass(frozen=True)
class Layout:
    """The cells of an image's vision tokens.

    views: rows and columns of each view; a view shows the whole image, or one frame of a video.
    cells: one per token in prompt order; None for a token without a cell.  tiling: of the
    view that is cut into tiles, None where there is none, or how it is cut is not known.
    """

    views: tuple[tuple[int, int], ...]
    cells: tuple[Cell | None, ...]
    tiling: Tiling | None = None

    @classmethod
    def grid(cls, *shape: int) -> Layout:
        """Row by row: (rows, columns), or (frames, rows, columns) for a video.

        Models that merge patches (2 by 2, say) have a token per merged patch; see :func:`merged`.
        Raises ValueError for another form.
        """
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"a grid is (rows, columns) or (frames, rows, columns), got {shape}")
        *frames, rows, columns = shape
        views = frames[0] if frames else 1
        return cls(((rows, columns),) * views, tuple(
            Cell(view, row, column)
            for view in range(views) for row in range(rows) for column in range(columns)
        ))  # fmt: skip

    @classmethod
    def square(cls, tokens: int) -> Layout | None:
        """The square grid of ``tokens`` tokens; None when they make no square."""
        side = isqrt(tokens)
        return cls.grid(side, side) if side and side * side == tokens else None

    @classmethod
    def tiles(
        cls, rows: int, columns: int, tile: tuple[int, int], overview: str | None = "last"
    ) -> Layout:
        """``rows`` by ``columns`` tiles of ``tile`` tokens each, tile after tile.

        overview: "first", "last" or None: where one more tile shows the whole image, as most models
        that tile have it (last).  Raises ValueError for another word.
        """
        if overview not in ("first", "last", None):
            raise ValueError(f"overview is 'first', 'last' or None, got {overview!r}")
        high, wide = tile
        view = 1 if overview == "first" else 0
        split = [
            Cell(view, r * high + y, c * wide + x)
            for r in range(rows) for c in range(columns)
            for y in range(high) for x in range(wide)
        ]  # fmt: skip
        whole = [Cell(1 - view, y, x) for y in range(high) for x in range(wide)]
        fine = rows * high, columns * wide
        tiling = Tiling(view, (rows, columns), tile)
        if overview is None:
            return cls((fine,), tuple(split), tiling)
        if overview == "first":
            return cls((tile, fine), (*whole, *split), tiling)
        return cls((fine, tile), (*split, *whole), tiling)

    @classmethod
    def anyres(
        cls,
        base: tuple[int, int],
        fine: tuple[int, int],
        newline: bool = True,
        tiles: tuple[int, int] | None = None,
    ) -> Layout:
        """An overview of ``base`` tokens, then ``fine`` rows and columns of the whole image.

        newline: one more token ends each row of the fine grid, as AnyRes has it; the
        fine grid is what is left once padding is cut off, as much on either side.  tiles: rows and
        columns of tiles of ``base`` tokens that it was cut from, where they were not scaled down.
        """
        whole = [Cell(0, y, x) for y in range(base[0]) for x in range(base[1])]
        rows: list[Cell | None] = []
        for y in range(fine[0]):
            rows += [Cell(1, y, x) for x in range(fine[1])]
            rows += [None] if newline else []
        tiling = None
        if tiles is not None:
            cut = [(n * b - f) // 2 for n, b, f in zip(tiles, base, fine, strict=True)]
            tiling = Tiling(1, tiles, base, (cut[0], cut[1]))
        return cls((base, fine), (*whole, *rows), tiling)


def layout_of(layout: Layout | Sequence[int]) -> Layout:
    """A layout as it is, or the grid of (rows, columns) or (frames, rows, columns)."""
    return layout if isinstance(layout, Layout) else Layout.grid(*map(int, layout))


def merged(grid: Sequence[int], tokens: int) -> Layout:
    """The layout of ``tokens`` tokens from a patch grid (frames, rows, columns), ``grid_thw``.

    Processors of models that merge patches give the grid before merging.  How many patches make a
    token follows from the numbers.  Raises ValueError when they do not fit.
    """
    frames, rows, columns = map(int, grid)
    side = isqrt(frames * rows * columns // max(tokens, 1))
    if side < 1 or frames * (rows // side) * (columns // side) != tokens:
        raise ValueError(f"{tokens} tokens do not come from a patch grid of {tuple(grid)}")
    return Layout.grid(frames, rows // side, columns // side)
