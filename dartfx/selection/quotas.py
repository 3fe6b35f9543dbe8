"""Budgets for each image of a row: spans of the vision mask, and how many tokens each keeps.

A span is a run of vision tokens without another token in between: an image, a tile or a frame where
the prompt sets text between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = ["quota_arguments", "share_out", "span_numbers", "split_budget"]


def quota_arguments(quota: str | Sequence[int], min_tokens: int) -> tuple[object, ...]:
    """What the options ``quota`` and ``min_tokens`` add to the operator's arguments."""
    if quota == "joint":
        return ()
    return ([] if isinstance(quota, str) else list(quota)), min_tokens


def span_numbers(vision_mask: Tensor) -> Tensor:
    """For each vision token the number of its span in its row, -1 elsewhere: [B, S] to int64."""
    before = torch.nn.functional.pad(vision_mask[:, :-1], (1, 0))
    return torch.where(vision_mask, (vision_mask & ~before).cumsum(1) - 1, -1)


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
                f"quota='image' with min_tokens={min_tokens} keeps at least {least_of_row} tokens "
                f"of the {images} images of row {row}, but its budget is {kept}; raise "
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
            if wanted > size:
                raise SelectionError(
                    f"quota[{image}]={wanted}, but image {image} of row {row} has only {size} "
                    "vision tokens"
                )
