"""The kept vision tokens of each image, from what a pruned graph recorded (option ``tokens``).

What compiled graphs return for it is in :mod:`dartfx.runtime.keep_idx`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dartfx.runtime.keep_idx import KeepIdxRecord
from dartfx.token_map.infer_layout import from_inputs
from dartfx.token_map.layout import Cell, Layout, layout_of

__all__ = ["KeptTokens", "Pick", "tokens_of"]


@dataclass(frozen=True)
class Pick:
    """One pivot and what it kept.

    position: in the prompt.  index: among the image's vision tokens, None for a text pivot or one
    of another image.  kept: indices among the image's vision tokens, ascending, itself included.
    """

    position: int
    index: int | None
    kept: tuple[int, ...]


@dataclass(frozen=True)
class KeptTokens:
    """The vision tokens of one image (or video) and which of them were kept.

    row: of the batch.  image: number among the row's images.  positions: of its vision tokens in
    the prompt.  kept: indices into them, ascending.  picks: per pivot, by position; empty when the
    selector is not "dart".  layout: where each vision token is in the image; None if unknown.
    """

    row: int
    image: int
    positions: tuple[int, ...]
    kept: tuple[int, ...]
    picks: tuple[Pick, ...] = ()
    layout: Layout | None = None

    @property
    def pivots(self) -> tuple[int, ...]:
        """The image's own pivots, as indices of its vision tokens."""
        return tuple(pick.index for pick in self.picks if pick.index is not None)

    @property
    def by_view(self) -> tuple[int, ...]:
        """How many tokens of each view were kept: frames of a video, overview and grid of tiles.

        Empty where the layout is not known.  Tokens without a cell count nowhere.
        """
        if self.layout is None:
            return ()
        views = Counter(cell.view for cell in self.cells() if cell is not None)
        return tuple(views[view] for view in range(len(self.layout.views)))

    @property
    def by_tile(self) -> tuple[int, ...]:
        """How many tokens of each tile were kept, row by row, the overview aside.

        Empty where there are no tiles, or how the image is cut into them is not known.
        """
        if self.layout is None or self.layout.tiling is None:
            return ()
        tiling = self.layout.tiling
        tiles = Counter(tiling.of(cell) for cell in self.cells() if cell is not None)
        return tuple(tiles[tile] for tile in range(tiling.grid[0] * tiling.grid[1]))

    def cells(self, layout: Layout | Sequence[int] | None = None) -> list[Cell | None]:
        """The grid cell of every kept token; None for a token without one (a newline).

        layout: as :func:`dartfx.token_map.layout.layout_of` takes it; by default the record's own.
        Raises ValueError when neither says where tokens are, or the number of tokens differs.
        """
        where = self._layout(layout)
        return [where.cells[i] for i in self.kept]

    def views(self) -> dict[int, int]:
        """The view (frame, tile grid, overview) of each position that has a cell."""
        cells = () if self.layout is None else self.layout.cells
        pairs = zip(self.positions, cells, strict=False)
        return {position: cell.view for position, cell in pairs if cell is not None}

    def _layout(self, layout: Layout | Sequence[int] | None) -> Layout:
        found = self.layout if layout is None else layout_of(layout)
        if found is None:
            raise ValueError(
                f"how {len(self.positions)} vision tokens lie in the image is not known; say it by "
                "a grid (rows, columns) or (frames, rows, columns), or by a Layout"
            )
        if len(found.cells) != len(self.positions):
            raise ValueError(
                f"the layout has {len(found.cells)} tokens, but the image {len(self.positions)}"
            )
        return found

    def __str__(self) -> str:
        head = f"row {self.row}, image {self.image}: {len(self.kept)} of {len(self.positions)} kept"
        pivots = [
            f"  {'text' if p.index is None else 'image'} pivot at {p.position}: {len(p.kept)} kept"
            for p in self.picks
        ]
        views = self.by_view
        if len(views) > 1:
            head += f", by frame or view: {', '.join(map(str, views))}"
        if self.by_tile:
            head += f", by tile: {', '.join(map(str, self.by_tile))}"
        return "\n".join([head, *pivots])


def tokens_of(
    record: KeepIdxRecord, layouts: Sequence[Layout | Sequence[int]] | Mapping[str, Any] | None
) -> list[KeptTokens]:
    """The kept tokens of a record with a vision mask, per image, in prompt order.

    layouts, and what is raised: as of :func:`dartfx.kept_tokens`.  Waits for the record's device.
    """
    assert record.vision_mask is not None
    vision = [row.nonzero()[:, 0].tolist() for row in record.vision_mask.cpu()]
    keep = [set(row) for row in record.keep_idx.tolist()]
    pickers = record.picker.tolist() if record.picker is not None else [None] * len(keep)
    if isinstance(layouts, Mapping):
        layouts = from_inputs(layouts, [len(run) for _, _, run, _ in _images(vision, None)])
    found = []
    for row, image, positions, layout in _images(vision, layouts):
        kept = [i for i, p in enumerate(positions) if p in keep[row]]
        picks = _picks(positions, kept, pickers[row])
        found.append(KeptTokens(row, image, tuple(positions), tuple(kept), picks, layout))
    return found


def _images(
    vision: list[list[int]], layouts: Sequence[Layout | Sequence[int]] | None
) -> Iterator[tuple[int, int, list[int], Layout | None]]:
    """Row, number, positions and layout of every image."""
    if layouts is None:
        for row, positions in enumerate(vision):
            breaks = [i for i, p in enumerate(positions) if i == 0 or p != positions[i - 1] + 1]
            for image, (start, end) in enumerate(zip(breaks, [*breaks[1:], None], strict=True)):
                run = positions[start:end]
                yield row, image, run, Layout.square(len(run))
        return
    left = [layout_of(layout) for layout in layouts]
    given = sum(len(layout.cells) for layout in left)
    if given != sum(map(len, vision)):
        raise ValueError(
            f"the layouts have {given} tokens, but the prompt {sum(map(len, vision))} vision tokens"
        )
    for row, positions in enumerate(vision):
        image, start = 0, 0
        while start < len(positions):
            layout = left.pop(0)
            run = positions[start : start + len(layout.cells)]
            yield row, image, run, layout
            image, start = image + 1, start + len(layout.cells)


def _picks(positions: list[int], kept: list[int], picker: list[int] | None) -> tuple[Pick, ...]:
    """The pivots that kept tokens of this image, or are tokens of it."""
    if picker is None:
        return ()
    index = {p: i for i, p in enumerate(positions)}
    by_pivot: dict[int, list[int]] = {}
    for i in kept:
        if picker[positions[i]] >= 0:
            by_pivot.setdefault(picker[positions[i]], []).append(i)
    return tuple(Pick(p, index.get(p), tuple(by_pivot[p])) for p in sorted(by_pivot))
