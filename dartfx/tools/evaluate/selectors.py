"""Selectors to compare with; importing this module registers them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dartfx.selection.dart import key_norms, stable_order, take_first
from dartfx.selection.registry import register_selector

__all__ = ["key_norm"]


@register_selector("key_norm")
def key_norm(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    **pivots: Any,
) -> Tensor:
    """Select the vision tokens with the largest L1 key norms: DART's pivot criterion alone.

    Arguments and result as in :class:`dartfx.selection.registry.Selector`.
    """
    return take_first(stable_order(-key_norms(keys)), vision_mask, budget)
