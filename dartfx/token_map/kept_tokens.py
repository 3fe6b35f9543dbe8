"""Which vision tokens a pruned call kept: ``dartfx.kept_tokens()``, with the option ``tokens``.

The rewritten graph then returns three small index tensors more, so that recording works the same
under Inductor, in CUDA graphs and across graph breaks.  Without the option nothing is added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import dartfx.ops.attribution  # noqa: F401  registers torch.ops.dartfx.picked_by
from dartfx.config.options import DartConfig
from dartfx.errors import DartfxError
from dartfx.observe.collecting import listening
from dartfx.passes.graph import Emitter
from dartfx.token_map.infer_layout import from_inputs
from dartfx.token_map.layout import Cell, Layout, layout_of

__all__ = ["KeptTokens", "Pick", "handing", "kept_positions", "kept_tokens", "recording"]

Compiled = Callable[..., Any]


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

    def cells(self, layout: Layout | Sequence[int] | None = None) -> list[Cell | None]:
        """The grid cell of every kept token; None for one that stands for no place (a newline).

        layout: as :func:`dartfx.token_map.layout.layout_of` takes it; by default the record's own.
        Raises ValueError when neither says where tokens are, or the number of tokens differs.
        """
        where = self._layout(layout)
        return [where.cells[i] for i in self.kept]

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
        return "\n".join([head, *pivots])


@dataclass(frozen=True)
class _Record:
    """What the last pruned graph said: keep_idx [B, S'], vision mask and pickers [B, S] or None."""

    keep: Tensor
    vision: Tensor
    picker: Tensor | None


_LOCK = threading.Lock()
_last: _Record | None = None


def forget() -> None:
    """Drop what was recorded."""
    _store(None)


def _store(record: _Record | None) -> None:
    global _last
    with _LOCK:
        _last = record


_handing: ContextVar[list[Tensor] | None] = ContextVar("dartfx_handed", default=None)


def handing() -> AbstractContextManager[list[Tensor]]:
    """The keep_idx [B, S'] of pruned graphs that ran in this context and hand it to the caller."""
    return listening(_handing)


def recording(
    config: DartConfig,
    module: GraphModule,
    compile: Callable[[GraphModule], Compiled],
    *,
    hands: bool = False,
) -> Compiled:
    """``compile(module)`` of a pruned graph, with its tokens recorded if the config says so.

    hands: give keep_idx to whoever opened :func:`handing` around the call.
    """
    if not config.tokens and not hands:
        return compile(module)
    added = _expose(module, config.tokens)
    return _Records(compile(module), added)


class _Records:
    """Runs a graph that returns index tensors behind its own outputs, and stores those."""

    def __init__(self, compiled: Compiled, added: int) -> None:
        self._compiled, self._added = compiled, added

    def __call__(self, *args: Any) -> Any:
        outputs = self._compiled(*args)
        # Copies: outputs of a CUDA graph are overwritten when it runs next.
        keep, *marks = (t.detach().clone() for t in outputs[-self._added :])
        if (handed := _handing.get()) is not None:
            handed.append(keep)
        if marks:
            vision, *picker = marks
            _store(_Record(keep, vision, *picker or [None]))
        return outputs[: -self._added]


def kept_positions(graph: Graph) -> list[Node]:
    """keep_idx [B, S'] int64 after each cut of a pruned graph, in the prompt's positions.

    A later cut selects among what the one before it left, so all but the first are emitted here.
    """
    kept, *later = _selections(graph)
    found = [kept]
    for select in later:
        kept = Emitter(select.next)(torch.ops.aten.gather.default, kept, 1, select)
        found.append(kept)
    return found


def _selections(graph: Graph) -> list[Node]:
    operator = torch.ops.dartfx.select_tokens.default
    return list(graph.find_nodes(op="call_function", target=operator))


def _expose(module: GraphModule, tokens: bool) -> int:
    """Let a pruned graph return keep_idx and, for tokens, vision mask and pickers; how many.

    Where several cuts were made, positions are those of the prompt and pickers those of the last.
    """
    graph = module.graph
    kept, last = kept_positions(graph), _selections(graph)[-1]
    vision = kept[0].args[2]
    added: list[Any] = [kept[-1]]
    if tokens:
        added.append(vision)
    if tokens and last.args[8] == "dart":
        emit = Emitter(kept[-1].next)
        picker = emit(torch.ops.dartfx.picked_by.default, *last.args[:8])
        if len(kept) > 1:
            picker = emit(torch.ops.dartfx.in_prompt.default, picker, kept[-2], vision)
        added.append(picker)
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], *added),)
    graph.lint()
    module.recompile()
    return len(added)


def kept_tokens(
    layouts: Sequence[Layout | Sequence[int]] | Mapping[str, Any] | None = None,
) -> list[KeptTokens]:
    """Which vision tokens the last pruned call kept, per image, in prompt order.

    layouts: the call's keyword arguments, where they tell sizes; or how
    each image's tokens lie, in the order of the images over all rows: a grid (rows, columns) or
    (frames, rows, columns), or a Layout.  They also say where one image ends and the next begins.
    Without them every unbroken run of vision tokens is an image, and square where its number of
    tokens is.  Waits for the call's device.  Raises DartfxError when nothing was recorded,
    ValueError for layouts of another number of tokens or arguments that do not tell them.
    """
    with _LOCK:
        record = _last
    if record is None:
        raise DartfxError(
            "no kept tokens were recorded: compile with the option tokens=True and run a call that "
            "is pruned, or use dartfx.explain(..., tokens=True)"
        )
    vision = [row.nonzero()[:, 0].tolist() for row in record.vision.cpu()]
    keep = [set(row) for row in record.keep.tolist()]
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
