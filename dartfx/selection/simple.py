"""Baselines: selectors that read nothing of the tokens, or one quantity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartfx.selection.dart import stable_order, take_first

__all__ = ["random", "uniform"]


def random(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    **pivots: Any,
) -> Tensor:
    """A uniformly random subset of the vision tokens, drawn from torch's global generator."""
    scores = torch.rand(vision_mask.shape, device=vision_mask.device)
    return take_first(stable_order(scores), vision_mask, budget)


def uniform(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    **pivots: Any,
) -> Tensor:
    """Vision tokens at even distances in vision order: the middle one of each of R equal bins."""
    total = vision_mask.sum(1, keepdim=True).clamp(min=1)
    share, half = budget[:, None], total // 2
    # Token number t (from 1) is kept where round(t * R / N) steps up from that of t - 1.
    number = vision_mask.cumsum(1)
    return vision_mask & ((number * share + half) // total > ((number - 1) * share + half) // total)
