"""Budgets for each image of a row: spans of the vision mask, and how many tokens each keeps.

A span is a contiguous run of vision tokens: an image, or a tile or frame where the prompt puts text
between them.  With quota="frame" a run is split at frame boundaries, which only the arguments of
the call determine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = [
    "FrameLengths",
    "before_in_frames",
    "frames_by",
    "quota_arguments",
    "share_out",
    "span_numbers",
    "split_budget",
]

FrameLengths = Callable[[list[int]], list[int]]
"""Lengths of a batch's runs of vision tokens, in prompt order -> those of its frames."""

_frame_lengths: ContextVar[FrameLengths | None] = ContextVar("dartfx_frames", default=None)


@contextmanager
def frames_by(lengths: FrameLengths) -> Iterator[None]:
    """Provide frame boundaries to the selections inside the ``with`` block.

    Where ``lengths`` raises ValueError, an outer ``frames_by`` applies: ``generate`` has more
    information about the images than the calls that it makes.
    """
    outer = _frame_lengths.get()

    def known(runs: list[int]) -> list[int]:
        try:
            return lengths(runs)
        except ValueError:
            if outer is None:
                raise
            return outer(runs)

    token = _frame_lengths.set(known)
    try:
        yield
    finally:
        _frame_lengths.reset(token)


def quota_arguments(quota: str | Sequence[int], min_tokens: int) -> tuple[object, ...]:
    """What the options ``quota`` and ``min_tokens`` add to the operator's arguments."""
    if quota == "joint":
        return ()
    if isinstance(quota, str) and quota not in ("image", "frame"):
        raise SelectionError(f"quota={quota!r} is none of 'joint', 'image', 'frame' and numbers")
    return ([] if isinstance(quota, str) else list(quota)), min_tokens, quota == "frame"


def span_numbers(vision_mask: Tensor, frames: bool = False) -> Tensor:
    """For each vision token the number of its span in its row, -1 elsewhere: [B, S] to int64.

    frames: cut runs where the call's frames end.  Raises SelectionError where nothing says where.
    """
    first = vision_mask & ~torch.nn.functional.pad(vision_mask[:, :-1], (1, 0))
    if frames:
        first = first | _frame_starts(vision_mask, first)
    return torch.where(vision_mask, first.cumsum(1) - 1, -1)


def _frame_starts(vision_mask: Tensor, first: Tensor) -> Tensor:
    lengths_of, total = _frame_lengths.get(), int(vision_mask.sum())
    if lengths_of is None:
        raise SelectionError(
            "quota='frame' reads where frames end off the arguments of the call, and nothing "
            "passed them on; compile with dartfx.compile, or take quota='image'"
        )
    starts = first[vision_mask].nonzero()[:, 0].tolist()
    runs = [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]
    try:
        lengths = torch.tensor(lengths_of(runs))
    except ValueError as error:
        raise SelectionError(f"quota='frame', but {error}; or take quota='image'") from error
    marks = torch.zeros(total, dtype=torch.bool)
    marks[lengths.cumsum(0) - lengths] = True
    return torch.zeros_like(vision_mask).masked_scatter(vision_mask, marks.to(vision_mask.device))


def before_in_frames(spans: Tensor) -> Tensor:
    """The position of each vision token's place in the span before, -1 without one: [B, S].

    spans: as of :func:`span_numbers`.  A span has one before it if that is as long.
    """
    before = torch.full_like(spans, -1)
    for row, numbers in enumerate(spans):
        places = [(numbers == n).nonzero()[:, 0] for n in range(int(numbers.max()) + 1)]
        for earlier, later in itertools.pairwise(places):
            if len(earlier) == len(later):
                before[row, later] = earlier
    return before


def split_budget(sizes: Tensor, budget: Tensor, least: Tensor) -> Tensor:
    """How many tokens each of M spans keeps: [B, M] int64 that sums to ``budget`` in every row.

    sizes, least: [B, M] int64, least at most sizes.  budget: [B] int64, between their sums.  Every
    span keeps its least; the rest goes by what each could still keep, by largest remainders, ties
    to the earlier span.
    """
    room = sizes - least
    total = room.sum(1, keepdim=True).clamp(min=1)
    rest = budget[:, None] - least.sum(1, keepdim=True)
    share, remainder = rest * room // total, rest * room % total
    missing = rest - share.sum(1, keepdim=True)
    order = torch.sort(remainder, dim=1, descending=True, stable=True).indices
    place = torch.arange(sizes.shape[1], device=sizes.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    return least + share + (rank < missing)


def share_out(spans: Tensor, budget: Tensor, quota: Sequence[int], min_tokens: int) -> Tensor:
    """Budgets [B, M] of M spans: [B, S] numbers of :func:`span_numbers`, and [B] row budgets.

    quota: the least for each span, or empty for ``min_tokens`` each (all of a smaller one).
    Raises SelectionError naming row and numbers where they do not fit.  Reads on the host.
    """
    rows, most = spans.shape[0], max(int(spans.max()) + 1, 1)
    sizes = torch.zeros(rows, most + 1, dtype=torch.int64, device=spans.device)
    sizes = sizes.scatter_add(1, spans + 1, torch.ones_like(spans))[:, 1:]
    if quota:
        _require_quota(sizes.tolist(), quota)
        least = torch.tensor(quota, device=spans.device).expand(rows, -1)
    else:
        least = sizes.clamp(max=min_tokens)
    needed = zip(least.sum(1).tolist(), budget.tolist(), strict=True)
    for row, (least_of_row, kept) in enumerate(needed):
        if least_of_row > kept:
            images = int((sizes[row] > 0).sum())
            raise SelectionError(
                f"quota={list(quota)} adds up to {least_of_row}, but the budget of row {row} is "
                f"{kept}; give numbers that add up to it"
                if quota
                else f"quota='image' with min_tokens={min_tokens} keeps at least {least_of_row} "
                f"tokens of the {images} images of row {row}, but its budget is {kept}; raise "
                "retain_tokens (or lower reduction_ratio), or lower min_tokens"
            )
    return split_budget(sizes, budget, least)


def _require_quota(sizes: list[list[int]], quota: Sequence[int]) -> None:
    for row, spans in enumerate(sizes):
        images = sum(size > 0 for size in spans)
        if images != len(quota):
            raise SelectionError(
                f"quota={list(quota)} has {len(quota)} numbers, but row {row} has {images} images "
                "(runs of vision tokens); give one for each, or quota='image'"
            )
        for image, (size, wanted) in enumerate(zip(spans, quota, strict=False)):
            if wanted < 1:
                raise SelectionError(f"quota[{image}]={wanted} leaves nothing; give 1 or more")
            if wanted > size:
                raise SelectionError(
                    f"quota[{image}]={wanted}, but image {image} of row {row} has only {size} "
                    "vision tokens"
                )
