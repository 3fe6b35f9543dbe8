"""What :func:`dartfx.compile` does to transformers' KV caches around a compiled call.

Sliding-window caches count their tokens in Python, where the compiled prefill counted the prompt's.
Static caches have room for all tokens from the start, so that every decode step has the same shapes
(CUDA graphs); a pruned prefill fills a growing cache instead, whose S' tokens in every layer
(uniform) are then copied over, one pass over the KV bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = [
    "dropped",
    "empty_static",
    "fill",
    "growing",
    "note_pruned",
    "recount",
    "require_unpruned",
    "tokens_given",
    "with_kept_columns",
    "without_room",
]


def tokens_given(kwargs: Mapping[str, Any]) -> int:
    """How many tokens of each row a call computes; 0 where its arguments do not say."""
    for name in ("inputs_embeds", "input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[1])
    return 0


def dropped(cache: Any) -> int:
    """How many tokens of every row pruning left out of a transformers cache's shortest layer."""
    return int(getattr(cache, _DROPPED, 0))


def require_unpruned(cache: Any, given: int) -> None:
    """Raise SelectionError where several tokens would continue a cache that pruning shortened.

    transformers takes the length of the cache for the tokens seen so far, and so would feed tokens
    of the prompt again, or leave rejected guesses in the cache.
    """
    lacking = dropped(cache)
    if lacking and given > 1 and int(cache.get_seq_length()) > 0:
        raise SelectionError(
            f"{given} tokens continue a cache that pruning left {lacking} tokens shorter than the "
            "text it stands for, so where they belong is not known. Give the whole conversation "
            "without past_key_values, and decode one token at a time (no assisted decoding or "
            "prompt lookup)"
        )


def note_pruned(cache: Any, given: int, handed: Sequence[Tensor]) -> None:
    """Note on a cache that began with this call what decode needs to know of its pruning.

    That is how many tokens its shortest layer lacks, and, for a batch, which were kept.
    handed: keep_idx [B, S'] of the graphs that say so.
    """
    lacking = [
        _wanted(layer, given) - layer.keys.shape[-2]
        for layer in getattr(cache, "layers", ())
        if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    if lacking and max(lacking) > 0:
        setattr(cache, _DROPPED, max(lacking))
        if handed and handed[-1].shape[0] > 1:
            setattr(cache, _KEPT, (given, handed[-1]))
            _count_kept(cache, handed[-1].shape[1])


def _count_kept(cache: Any, kept: int) -> None:
    """Let sliding layers count the kept tokens only: by that they find their columns of a mask.

    Of one that :func:`with_kept_columns` gathered; a window that is full is no exception.
    """
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = kept


def _wanted(layer: Any, given: int) -> int:
    """How many tokens a cache layer holds after ``given`` tokens, at least."""
    if getattr(layer, "is_sliding", False):
        return min(given, int(layer.sliding_window) - 1)
    return given


def with_kept_columns(cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decode step's arguments, its mask [B, S + t] gathered as the cache was: [B, S' + t].

    transformers reads as many of the mask's first columns as the cache holds tokens.  That fits
    when every row kept its pads; a row with fewer vision tokens than others lost some of them.
    """
    found, mask = getattr(cache, _KEPT, None), kwargs.get("attention_mask")
    if found is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return kwargs
    prompt, keep = found
    if mask.shape[1] <= prompt:
        return kwargs
    if len(mask) != len(keep):
        raise SelectionError(
            f"an attention mask of {len(mask)} rows came with a cache that was pruned with "
            f"{len(keep)} rows; give generate the batch as it will be decoded"
        )
    kept = mask[:, :prompt].gather(1, keep)
    return {**kwargs, "attention_mask": torch.cat([kept, mask[:, prompt:]], 1)}


# Attributes, so that a copy of the cache knows them, too.
_DROPPED = "_dartfx_dropped"
_KEPT = "_dartfx_kept"


def empty_static(cache: Any) -> bool:
    """Whether a transformers cache is static in all layers and holds no token yet.

    Static sliding-window layers do not count: which slot they write depends on the whole prompt.
    """
    layers = list(getattr(cache, "layers", ()))
    static = all(
        hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)
        for layer in layers
    )
    # All layers count alike; one is asked, for on a GPU the question waits for the device.
    return bool(layers) and static and int(layers[0].get_seq_length()) == 0


def growing() -> Any:
    """A new transformers cache that grows with its tokens."""
    return sys.modules["transformers"].DynamicCache()


def without_room(mask: Any) -> Any:
    """A prefill's attention mask without the columns of a static cache's free slots.

    transformers makes it before the model, [B, 1, S, slots], or one per kind of layer in a dict;
    a mask [B, S] or None stays.
    """
    if isinstance(mask, dict):
        return {kind: without_room(each) for kind, each in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask[..., : mask.shape[-2]]
    return mask


def fill(static: Any, grown: Any) -> None:
    """Copy all tokens of ``grown`` to the first slots of ``static``, an empty static cache.

    Keys and values [B, H, S', Dh] per layer.  Raises ValueError where a layer's room is too small
    or the layers hold different numbers of tokens, which one decode mask could not fit.
    """
    lengths = {layer.keys.shape[-2] for layer in grown.layers}
    room = min(layer.max_cache_len for layer in static.layers)
    if len(lengths) != 1 or max(lengths) > room or len(grown.layers) != len(static.layers):
        raise ValueError(
            f"caches of {len(grown.layers)} layers with {sorted(lengths)} tokens do not fit a "
            f"static cache of {len(static.layers)} layers with room for {room}"
        )
    for slot, layer in zip(static.layers, grown.layers, strict=True):
        slot.update(layer.keys, layer.values)
    setattr(static, _DROPPED, dropped(grown))


def recount(cache: Any) -> None:
    """Set the token counts of a transformers cache's sliding layers to what pruning left of them.

    Such a layer counts in Python, so the compiled prefill counted the tokens of the whole prompt.
    """
    for layer in getattr(cache, "layers", ()):
        if not getattr(layer, "is_sliding", False) or not isinstance(layer.keys, Tensor):
            continue
        counted = getattr(layer, "cumulative_length", None)
        held = layer.keys.shape[-2]
        if isinstance(counted, int) and held < min(counted, layer.sliding_window - 1):
            layer.cumulative_length = held
