"""Selectors that keep what differs and, at the same time, cover the whole image.

Vision order is the only idea of place here: it needs no grid, and holds for many images in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.selection.dart import (
    accumulation_dtype,
    cosines,
    first_largest,
    key_norms,
    plan_turns,
    stable_order,
    unit_vectors,
)

__all__ = ["places", "scores_of", "spread", "take_apart", "take_apart_by_steps", "tiled"]


def tiled(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> Tensor:
    """Of each of R equal stretches of a row's vision tokens the one that is least like a pivot.

    Arguments and result as in :class:`dartfx.selection.registry.Selector`.  Pivots are DART's;
    what counts is the cosine to the nearest of them.  They only guide: none is kept for being one.
    """
    turns = plan_turns(keys, vision_mask, text_mask, budget, pivot_image_tokens, pivot_text_tokens)
    likeness = torch.zeros_like(vision_mask, dtype=accumulation_dtype(hidden))
    if turns.pivots.shape[1]:
        pivots = (turns.image_pivots | turns.text_pivots).sum(1)[:, None, None]
        slot = torch.arange(turns.pivots.shape[1], device=hidden.device)[:, None]
        to_each = cosines(hidden, turns.pivots)
        # Slots that a row does not need hold a position all the same.
        likeness = torch.where(slot < pivots, to_each, -torch.inf).amax(1)
    order = stable_order(likeness)
    total = vision_mask.sum(1, keepdim=True).clamp(min=1)
    stretch = (vision_mask.cumsum(1) - 1) * budget[:, None] // total
    stretch = torch.where(vision_mask, stretch, -1).gather(1, order)
    stretch, within = torch.sort(stretch, dim=1, stable=True)
    first = stretch.diff(dim=1, prepend=torch.full_like(stretch[:, :1], -1)) > 0
    kept = torch.zeros_like(vision_mask).scatter(1, order.gather(1, within), first)
    return kept & (budget > 0)[:, None]


def spread(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    most: int,
    **pivots: Any,
) -> Tensor:
    """The vision tokens that farthest-point sampling takes, one after the other.

    The first is that of the largest key norm (before layer 0, the first in the row); then always
    the one whose nearest kept token is farthest.  Two tokens are apart by 1 less their cosine, and
    by how many of R equal stretches of the row's vision tokens lie between them, up to one.

    most: the largest budget, which is the number of steps.  The others, and the result, as in
    :class:`dartfx.selection.registry.Selector`.

    Source: DivPrune (arXiv 2503.02175) section 3.  What differs: place counts there for nothing,
    the first token is the one whose nearest other is farthest, and it prunes what the projector
    gives.  Without place, counting falls to chance on the model of docs/quality.md.
    """
    units = unit_vectors(hidden)
    kept: Tensor = torch.ops.dartfx.take_apart(units, key_norms(keys), vision_mask, budget, most)
    return kept


def places(members: Tensor, budget: Tensor, dtype: torch.dtype) -> Tensor:
    """Where each member is, counted in stretches of the row, as many as are kept: [B, S]."""
    return members.cumsum(1) * (budget / members.sum(1).clamp(min=1)).to(dtype)[:, None]


def scores_of(numbers: Tensor) -> Tensor:
    """What is no number is taken last, but before what is no member."""
    return torch.where(numbers.isnan(), torch.finfo(numbers.dtype).min, numbers)


def take_apart_by_steps(
    units: Tensor, first: Tensor, members: Tensor, budget: Tensor, most: int
) -> Tensor:
    """Farthest-point sampling in plain torch: the ``budget[b]`` members of each row that it takes.

    units: [B, S, D] float, of length 1.  first: [B, S] float, of which the largest is taken first.
    members: [B, S] bool.  budget: [B] int64, none above ``most``.  Returns [B, S] bool.
    """
    position = torch.arange(members.shape[1], device=members.device)
    place = places(members, budget, units.dtype)
    score = scores_of(first)
    nearest = torch.full_like(score, torch.inf)
    kept = torch.zeros_like(members)
    steps = int(budget.max()) if budget.device.type == "cpu" else most
    for step in range(steps):
        score = torch.where(members & ~kept, score, -torch.inf)
        at = first_largest(score)
        kept = kept | ((position == at) & members & (step < budget)[:, None])
        unit = units.gather(1, at[:, :, None].expand(-1, -1, units.shape[2]))
        apart = 1 - (units * unit).sum(-1) + (place - place.gather(1, at)).abs().clamp(max=1)
        nearest = torch.minimum(nearest, apart)
        score = scores_of(nearest)
    return kept


# Opaque, because what it is made of is a loop: unrolled into a graph it would be thousands of
# operators, as many as tokens are kept. On a GPU dartfx/ops/farthest/ takes its steps.
take_apart = custom_op(
    "dartfx::take_apart",
    take_apart_by_steps,
    mutates_args=(),
    schema="(Tensor units, Tensor first, Tensor members, Tensor budget, SymInt most) -> Tensor",
)


@take_apart.register_fake
def _take_apart_fake(
    units: Tensor, first: Tensor, members: Tensor, budget: Tensor, most: int
) -> Tensor:
    return torch.empty_like(members)
