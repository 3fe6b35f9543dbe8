"""A selector for video: what is new in a frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartfx.selection.dart import EPS, accumulation_dtype, stable_order, take_first

__all__ = ["changed"]


def changed(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    before: Tensor,
    **pivots: Any,
) -> Tensor:
    """The vision tokens least like the token at the same place of the frame before, by cosine.

    before: [B, S] int64, that token's position.  Tokens without one (of the first frame, or behind
    a frame of another size) are compared with the mean of their frame.  The others, and the result,
    as in :class:`dartfx.selection.registry.Selector`, vision_mask and budget being one frame's.

    Source: the comparison of neighbouring frames in DyCoke (arXiv 2411.15024).  What differs:
    tokens are ranked instead of merged above a threshold, and each frame has a budget.  Arithmetic
    is float32, float64 for float64 inputs; ties go to the lowest position.
    """
    hidden = hidden.to(accumulation_dtype(hidden))
    norms = (hidden * hidden).sum(-1).sqrt().clamp(min=EPS)
    number = vision_mask.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(vision_mask[..., None], hidden, 0).sum(1, keepdim=True) / number[..., None]
    at = before.clamp(min=0)
    earlier = hidden.gather(1, at[..., None].expand_as(hidden))
    to_earlier = (hidden * earlier).sum(-1) / (norms * norms.gather(1, at))
    to_mean = (hidden * mean).sum(-1) / (norms * (mean * mean).sum(-1).sqrt().clamp(min=EPS))
    likeness = torch.where(before >= 0, to_earlier, to_mean)
    return take_first(stable_order(likeness), vision_mask, budget)
