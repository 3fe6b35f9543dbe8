"""The batch rule: every row of a batch keeps the same, statically known number of positions.

With N = vision feature rows / B and R = min(retain, N), every row keeps S' = S - N + R positions.
A row whose vision tokens differ in number from N makes up the difference with vision tokens or
pads, never with text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dartfx.selection.dart import positions_of
from dartfx.selection.opaque import opaque_on_cpu

__all__ = [
    "BatchPlan",
    "enforce_budget",
    "keep_positions",
    "kept_length",
    "plan_batch",
    "smaller",
]

# An int or a SymInt. Any, because the type stubs of torch know no arithmetic between SymInt and
# Tensor.
Size: TypeAlias = Any


@dataclass(frozen=True)
class BatchPlan:
    """What each row of a batch keeps in addition to the chosen vision tokens.

    text: [B, S] bool, valid non-vision positions.  text_after: the part of it after the row's
    last vision token.  pads: [B, S] bool.  budget: [B] int64, vision tokens to keep.
    fits: [B] bool, False where the row's text and budget exceed ``length``.  pads_kept: [B] int64.
    length: S'.
    """

    text: Tensor
    text_after: Tensor
    pads: Tensor
    budget: Tensor
    fits: Tensor
    pads_kept: Tensor
    length: Size


def kept_length(sequence: Size, vision_tokens: Size, retain: Size) -> Size:
    """S' = S - N + min(R, N), without comparing symbolic sizes (which would install guards)."""
    return sequence - vision_tokens + smaller(retain, vision_tokens)


def smaller(a: Size, b: Size) -> Size:
    """min(a, b), without a guard."""
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call]


def plan_batch(
    vision_mask: Tensor, valid_mask: Tensor | None, vision_tokens: Size, retain: Size
) -> BatchPlan:
    """Row budgets by the batch rule: vision_mask, valid_mask (None: all valid) are [B, S] bool."""
    length = kept_length(vision_mask.shape[1], vision_tokens, retain)
    planned = row_plans(vision_mask, valid_mask, length, smaller(retain, vision_tokens))
    return BatchPlan(*planned, length)


def _row_plans_fake(vision_mask: Tensor, *_: Any) -> tuple[Tensor, ...]:
    def like(dtype: torch.dtype) -> Tensor:
        return vision_mask.new_empty(vision_mask.shape[:1], dtype=dtype)

    masks = [torch.empty_like(vision_mask) for _ in range(3)]
    return *masks, like(torch.int64), like(torch.bool), like(torch.int64)


@opaque_on_cpu(
    "(Tensor vision_mask, Tensor? valid_mask, SymInt length, SymInt retain) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _row_plans_fake,
)
def row_plans(
    vision_mask: Tensor, valid_mask: Tensor | None, length: Size, retain: Size
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a :class:`BatchPlan`, for rows that keep ``length`` positions."""
    sequence = vision_mask.shape[1]
    valid = torch.ones_like(vision_mask) if valid_mask is None else valid_mask
    text, pads = valid & ~vision_mask, ~valid & ~vision_mask

    vision = vision_mask.sum(1)
    # A row with few non-vision positions must keep more than R vision tokens to reach S'.
    budget = torch.minimum(vision, (vision + (length - sequence)).clamp(min=retain))
    position = torch.arange(sequence, device=vision_mask.device)
    last = torch.where(vision_mask, position, -1).amax(1, keepdim=True)
    after = (position > last) & (last >= 0)
    pads_kept = length - text.sum(1) - budget
    return text, text & after, pads, budget, pads_kept >= 0, pads_kept


def enforce_budget(kept: Tensor, vision_mask: Tensor, budget: Tensor) -> Tensor:
    """A selector's choice with exactly ``budget[b]`` vision tokens: [B, S] bool to [B, S] bool.

    Surplus tokens are dropped from the end of the row, missing ones taken from its start. The
    identity for a selector that met its budget.
    """
    kept = kept & vision_mask
    kept = kept & (kept.cumsum(1) <= budget[:, None])
    spare = vision_mask & ~kept
    missing = budget - kept.sum(1)
    return kept | (spare & (spare.cumsum(1) <= missing[:, None]))


def keep_positions(plan: BatchPlan, kept: Tensor) -> Tensor:
    """All positions that stay, ascending: kept vision [B, S] bool to [B, S'] int64."""
    return positions_with_text(kept, plan.text, plan.pads, plan.pads_kept, plan.length)


@opaque_on_cpu(
    "(Tensor kept, Tensor text, Tensor pads, Tensor pads_kept, SymInt length) -> Tensor",
    lambda kept, *_: kept.new_empty((kept.shape[0], _[-1]), dtype=torch.int64),
)
def positions_with_text(
    kept: Tensor, text: Tensor, pads: Tensor, pads_kept: Tensor, length: Size
) -> Tensor:
    """Positions of kept vision tokens, text, and the last ``pads_kept`` pads of each row."""
    # Counted from the end of the row: the lowest pads are dropped first.
    behind = pads.sum(1, keepdim=True) - pads.cumsum(1)
    pads = pads & (behind < pads_kept[:, None])
    return positions_of(kept | text | pads, length)
