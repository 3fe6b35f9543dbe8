"""Selectors that rank vision tokens by the attention of text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dartfx.selection.dart import accumulation_dtype, stable_order, take_first

__all__ = ["attention_of", "fastv"]


def fastv(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    queries: Tensor,
    valid_mask: Tensor,
    **pivots: Any,
) -> Tensor:
    """The vision tokens to which the row's last valid token pays most attention, mean over heads.

    queries: [B, Hq, S, Dh], Hq a multiple of the keys' heads.  valid_mask: [B, S] bool.  The
    others, and the result, as in :class:`dartfx.selection.registry.Selector`.  Scores are taken
    over all valid positions; a window that layer K-1 attends within is not known here.  Arithmetic
    is float32, float64 for float64 inputs.  Source: FastV (arXiv 2403.06764) section 4, with ties
    to the lowest position.
    """
    position = torch.arange(valid_mask.shape[1], device=valid_mask.device)
    last = torch.where(valid_mask, position, 0).amax(1)
    at = last[:, None, None, None].expand(-1, queries.shape[1], 1, queries.shape[3])
    attention = attention_of(queries.gather(2, at), keys, valid_mask)
    return take_first(stable_order(-attention), vision_mask, budget)


def attention_of(query: Tensor, keys: Tensor, valid_mask: Tensor) -> Tensor:
    """What one query a row pays to each valid position, mean over heads; 0 elsewhere.

    query: [B, Hq, 1, Dh] float.  keys: [B, H, S, Dh] float; each serves Hq / H queries in turn.
    valid_mask: [B, S] bool.  Returns [B, S] float32, float64 for float64 keys.
    """
    dtype = accumulation_dtype(keys)
    heads, width = keys.shape[1], keys.shape[3]
    grouped = query.to(dtype).view(query.shape[0], heads, -1, width)
    # A product and a sum, as in reference.cosines: a padded row then ranks as it does alone.
    products = (grouped[:, :, :, None] * keys.to(dtype)[:, :, None]).sum(-1) / math.sqrt(width)
    weights = products.masked_fill(~valid_mask[:, None, None], -math.inf).softmax(-1)
    attention: Tensor = weights.mean((1, 2))
    return attention
