"""Selectors that rank vision tokens by the attention inside the vision tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.selection.dart import accumulation_dtype, stable_order, take_first

__all__ = ["attended", "attention_received"]


def attended(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    tower_attention: Tensor,
    **pivots: Any,
) -> Tensor:
    """The vision tokens that get most attention in the vision tower.

    tower_attention: [B, S] float, what each vision token gets in the tower's last layer that its
    features come from: from the class token, where features leave that one out, else the mean over
    all tokens of the image; the mean over heads.  The others, and the result, as in
    :class:`dartfx.selection.registry.Selector`.  Ties go to the lowest position.  The prompt counts
    for nothing.

    Source: the dominant tokens of VisionZip (arXiv 2412.04467) section 3.2, and the important
    tokens of VisPruner (arXiv 2412.01818).  What differs: VisionZip merges what is left into a
    number of contextual tokens (``merge="nearest"`` averages it into those kept instead), and
    VisPruner spends part of the budget on tokens that are not alike; here all of it goes by
    attention.  Several images of a row share one budget, and each image's attention sums to one.
    """
    return take_first(stable_order(-tower_attention), vision_mask, budget)


# Opaque, so that what a whole attention takes is held for one image at a time.
@custom_op(
    "dartfx::attention_received",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, float scale, bool by_first) -> Tensor",
)
def attention_received(queries: Tensor, keys: Tensor, scale: float, by_first: bool) -> Tensor:
    """The attention that each key gets, the mean over heads and queries: [I, P] of I images.

    queries: [I, Hq, P, Dh].  keys: [I, H, P, Dh]; each serves Hq / H queries in turn.  scale: of
    their products.  by_first: counts the first query of each image alone.  float32, float64 for
    float64 keys.
    """
    dtype, heads = accumulation_dtype(keys), keys.shape[1]
    counted = queries[:, :, :1] if by_first else queries
    received = []
    with torch.autocast(keys.device.type, enabled=False):
        for query, key in zip(counted.to(dtype), keys.to(dtype), strict=True):
            grouped = query.reshape(heads, -1, query.shape[-1])
            scores = grouped @ key.transpose(-1, -2) * scale
            received.append(scores.softmax(-1).mean((0, 1)))
    return torch.stack(received)


@attention_received.register_fake
def _attention_received_fake(queries: Tensor, keys: Tensor, scale: float, by_first: bool) -> Tensor:
    return keys.new_empty((keys.shape[0], keys.shape[2]), dtype=accumulation_dtype(keys))
