"""Masks of later calls on caches whose keys are calibrated.

The prefill's graph adds the log of each key's group size to the scores of the layers behind the cut
(``passes/dropped/calibrate.py``).  Later calls read the same keys from the cache.  With the
uniform layout the columns of all layers are the same tokens, so that one mask of floats fits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx.config.options import DartConfig
from dartfx.errors import SelectionError
from dartfx.model.caches.filling import is_offloaded, racing
from dartfx.model.caches.kv_cache import is_sliding, is_static, pruned_layers
from dartfx.model.caches.pruned_layers import PrunedLayer
from dartfx.passes.refusal import Declined

__all__ = ["calibrated_mask", "is_calibrated", "unfit"]


def is_calibrated(cache: Any) -> bool:
    """Whether a cache's keys count for the tokens dropped in their favour."""
    return any(layer.kept and layer.kept.log_sizes is not None for layer in pruned_layers(cache))


def unfit(caches: Sequence[Any], config: DartConfig) -> Declined | None:
    """Why a call with these caches runs uncompiled, if it does.

    Because calibrated keys may not get into one, or as :func:`dartfx.model.caches.filling.racing`.
    """
    if (declined := racing(caches)) is not None or not config.calibrate:
        return declined
    for cache in caches:
        quantised = any(hasattr(layer, "_quantized_keys") for layer in cache.layers)
        if is_static(cache) or is_offloaded(cache) or quantised:
            return Declined(
                f"calibrated keys need masks that grow with the KV cache, and a "
                f"{type(cache).__name__} is static, offloaded or quantised",
                advice="the default DynamicCache, or calibrate=False",
            )
    return None


def calibrated_mask(cache: Any, mask: Any, tokens: int) -> Tensor | dict[str, Tensor | None]:
    """What ``tokens`` more tokens add to their attention scores: [B, 1, tokens, columns].

    mask: the call's, None or with the columns of the cache last, [B, columns or more].  A dict by
    kind of layer where some have windows.  Raises SelectionError where no such mask is known.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise SelectionError(
            "a mask that is not [rows, tokens] came with a calibrated KV cache, for which dartfx "
            "makes masks itself; pass the mask of pads, or none"
        )
    layer = next(each for each in pruned_layers(cache) if not is_sliding(each))
    addend = _addend(layer, mask, tokens)
    if not any(map(is_sliding, cache.layers)):
        return addend
    if tokens > 1:
        raise SelectionError(
            f"{tokens} tokens continue a calibrated KV cache with sliding windows, and which of "
            "them each sees there is not known; decode one token at a time, or compile with "
            "calibrate=False"
        )
    return {"full_attention": addend, "sliding_attention": None}  # one token sees all of a window


def _addend(layer: PrunedLayer, mask: Tensor | None, tokens: int) -> Tensor:
    assert layer.kept is not None and layer.kept.log_sizes is not None
    keys: Tensor = layer.keys
    columns, lowest = keys.shape[-2] + tokens, torch.finfo(keys.dtype).min
    sizes = layer.kept.log_sizes.to(keys)
    addend = torch.nn.functional.pad(sizes, (0, columns - sizes.shape[1]))[:, None, None]
    if mask is not None:
        hidden = mask[:, None, None, -columns:] == 0
        addend = addend.masked_fill(hidden.to(addend.device), lowest)
    if tokens > 1:
        seen = torch.ones(tokens, columns, dtype=torch.bool, device=addend.device)
        addend = addend.masked_fill(~seen.tril(columns - tokens), lowest)
    return addend
