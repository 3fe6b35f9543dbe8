"""Static caches, which have slots for all tokens from the start.

So every decode step has the same shapes (CUDA graphs).  A pruned prefill fills a dynamic cache
instead, whose S' tokens in every layer (uniform) are then copied over, one pass over the KV bytes.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from dartfx.model.caches.kv_cache import is_sliding
from dartfx.model.caches.pruned_layers import PrunedLayer, make_pruned

__all__ = ["copy_into_static", "is_empty_static", "new_dynamic_cache", "strip_static_slots"]


def is_empty_static(cache: Any) -> bool:
    """Whether a transformers cache is static in all layers and holds no token yet.

    Static sliding-window layers do not count: which slot they write depends on the whole prompt.
    """
    layers = list(getattr(cache, "layers", ()))
    static = all(hasattr(layer, "max_cache_len") and not is_sliding(layer) for layer in layers)
    # All layers hold equally many tokens; on a GPU each query waits for the device, so one is read.
    return bool(layers) and static and int(layers[0].get_seq_length()) == 0


def new_dynamic_cache() -> Any:
    """A new transformers cache that grows with its tokens."""
    return sys.modules["transformers"].DynamicCache()


def strip_static_slots(mask: Any) -> Any:
    """A prefill's attention mask without the columns of a static cache's free slots.

    transformers makes it before the model, [B, 1, S, slots], or one per kind of layer in a dict;
    a mask [B, S] or None is returned unchanged.
    """
    if isinstance(mask, dict):
        return {kind: strip_static_slots(each) for kind, each in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask[..., : mask.shape[-2]]
    return mask


def copy_into_static(static: Any, dynamic: Any) -> None:
    """Copy all tokens of ``dynamic`` to the first slots of ``static``, an empty static cache.

    Keys and values [B, H, S', Dh] per layer.  Raises ValueError where a layer has too few slots or
    the layers hold different numbers of tokens, which one decode mask could not fit.
    """
    lengths = {layer.keys.shape[-2] for layer in dynamic.layers}
    slots = min(layer.max_cache_len for layer in static.layers)
    if len(lengths) != 1 or max(lengths) > slots or len(dynamic.layers) != len(static.layers):
        raise ValueError(
            f"caches of {len(dynamic.layers)} layers with {sorted(lengths)} tokens do not fit a "
            f"static cache of {len(static.layers)} layers with {slots} slots"
        )
    for n, layer in enumerate(dynamic.layers):
        static.layers[n].update(layer.keys, layer.values)
        if isinstance(layer, PrunedLayer):
            make_pruned(static.layers, n, layer.dropped, layer.kept)
