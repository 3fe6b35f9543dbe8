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
    """What each row of a batch keeps besides the choice of vision tokens.

    text: [B, S] bool, valid non-vision positions.  text_after: the part of it after the row's
    last vision token.  pads: [B, S] bool.  budget: [B] int64, vision tokens to keep.
    pads_kept: [B] int64, negative where the row's text and budget exceed ``length``.
    length: S'.
    """

    text: Tensor
    text_after: Tensor
    pads: Tensor
    budget: Tensor
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
    sequence = vision_mask.shape[1]
    length = kept_length(sequence, vision_tokens, retain)
    valid = torch.ones_like(vision_mask) if valid_mask is None else valid_mask
    text, pads = valid & ~vision_mask, ~valid & ~vision_mask

    vision = vision_mask.sum(1)
    # A row with few non-vision positions must keep more than R vision tokens to reach S'.
    wanted = (vision + (length - sequence)).clamp(min=smaller(retain, vision_tokens))
    budget = torch.minimum(vision, wanted)
    position = torch.arange(sequence, device=vision_mask.device)
    last = torch.where(vision_mask, position, -1).amax(1, keepdim=True)
    after = (position > last) & (last >= 0)
    return BatchPlan(text, text & after, pads, budget, length - text.sum(1) - budget, length)


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
    # Counted from the end of the row: the lowest pads are the first to go.
    behind = plan.pads.sum(1, keepdim=True) - plan.pads.cumsum(1)
    pads = plan.pads & (behind < plan.pads_kept[:, None])
    return positions_of(kept | plan.text | pads, plan.length)
