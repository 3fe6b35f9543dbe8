"""What :func:`dartfx.compile` does to transformers' KV caches around a compiled call.

Sliding-window caches count their tokens in Python, where the compiled prefill counted the prompt's.
Static caches have slots for all tokens from the start, so that every decode step has the same
shapes (CUDA graphs); a pruned prefill fills a dynamic cache instead, whose S' tokens in every layer
(uniform) are then copied over, one pass over the KV bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = [
    "copy_into_static",
    "fix_sliding_lengths",
    "gather_decode_mask",
    "is_cache",
    "is_empty_static",
    "mark_pruned",
    "new_dynamic_cache",
    "pruned_length",
    "require_unpruned",
    "strip_static_slots",
]


def is_cache(value: Any) -> bool:
    """Whether something is a transformers cache with layers."""
    return hasattr(value, "get_seq_length") and isinstance(getattr(value, "layers", None), list)


def pruned_length(cache: Any) -> int:
    """How many tokens pruning removed from every row of a transformers cache's shortest layer."""
    return int(getattr(cache, _PRUNED_LENGTH, 0))


def require_unpruned(cache: Any, tokens: int) -> None:
    """Raise SelectionError where several tokens would continue a cache that pruning shortened.

    transformers takes the length of the cache for the tokens seen so far, and so would feed tokens
    of the prompt again, or keep rejected guesses in the cache.
    """
    missing = pruned_length(cache)
    if missing and tokens > 1 and int(cache.get_seq_length()) > 0:
        raise SelectionError(
            f"{tokens} tokens continue a cache that pruning left {missing} tokens shorter than the "
            "text it stands for, so their positions are not known. Give the whole conversation "
            "without past_key_values, and decode one token at a time (no assisted decoding or "
            "prompt lookup)"
        )


def mark_pruned(cache: Any, tokens: int, keep_idx: Sequence[Tensor]) -> None:
    """Store on a cache that began with this call what decode needs to know of its pruning.

    That is how many tokens its shortest layer lacks, and, for a batch, which tokens were kept.
    keep_idx: [B, S'] of each graph that returned it.
    """
    missing = [
        _expected_length(layer, tokens) - held
        for layer in getattr(cache, "layers", ())
        if (held := held_tokens(layer)) is not None
    ]
    if missing and max(missing) > 0:
        setattr(cache, _PRUNED_LENGTH, max(missing))
        if keep_idx and keep_idx[-1].shape[0] > 1 and _is_uniform(cache, keep_idx[-1].shape[1]):
            setattr(cache, _KEEP_IDX, (tokens, keep_idx[-1]))
            _count_kept_tokens(cache, keep_idx[-1].shape[1])


def _is_uniform(cache: Any, length: int) -> bool:
    """Whether all layers without a window hold ``length`` tokens, so that one mask fits all."""
    layers = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    return {held_tokens(layer) for layer in layers} <= {None, length}


def held_tokens(layer: Any) -> int | None:
    """How many tokens of each row a cache layer holds; None where that is not known.

    Quantised layers hold their first tokens in codes, and keep an empty tensor as their keys.
    """
    keys, codes = getattr(layer, "keys", None), getattr(layer, "_quantized_keys", None)
    plain = keys.shape[-2] if isinstance(keys, Tensor) and keys.ndim == 4 else None
    if codes is None:
        return plain
    stored, *more = codes if isinstance(codes, tuple) else (codes,)
    # Codes are packed in a way of their own (HQQ) or one for each value.
    shape = more[0].get("shape", ()) if more and isinstance(more[0], dict) else stored.shape
    return int(shape[-2]) + (plain or 0) if len(shape) == 4 else None


def _count_kept_tokens(cache: Any, length: int) -> None:
    """Set the token counts of sliding layers to S', by which they find their mask columns.

    The mask is the one of :func:`gather_decode_mask`; a window that is full is no exception.
    """
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False):
            layer.cumulative_length = length


def _expected_length(layer: Any, tokens: int) -> int:
    """How many tokens a cache layer holds after ``tokens`` tokens, at least."""
    if getattr(layer, "is_sliding", False):
        return min(tokens, int(layer.sliding_window) - 1)
    return tokens


def gather_decode_mask(cache: Any, mask: Any) -> Any:
    """A decode step's mask [B, S + t] gathered as the cache was, [B, S' + t]; others unchanged.

    transformers reads as many of the mask's first columns as the cache holds tokens.  That fits
    when every row kept its pads; a row with fewer vision tokens than others lost some of them.
    """
    pruning = getattr(cache, _KEEP_IDX, None)
    if pruning is None or not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return mask
    prompt, keep_idx = pruning
    if mask.shape[-1] <= prompt or (mask.ndim == 2 and mask.is_floating_point()):
        return mask
    if len(mask) != len(keep_idx):
        raise SelectionError(
            f"an attention mask of {len(mask)} rows came with a cache that was pruned with "
            f"{len(keep_idx)} rows; give generate the batch as it will be decoded"
        )
    old, new = mask[..., :prompt], mask[..., prompt:]
    columns = keep_idx if mask.ndim == 2 else keep_idx[:, None, None].expand(*old.shape[:3], -1)
    return torch.cat([old.gather(-1, columns), new], -1)


# Attributes, so that a copy of the cache has them, too.
_PRUNED_LENGTH = "_dartfx_pruned_length"
_KEEP_IDX = "_dartfx_keep_idx"


def is_empty_static(cache: Any) -> bool:
    """Whether a transformers cache is static in all layers and holds no token yet.

    Static sliding-window layers do not count: which slot they write depends on the whole prompt.
    """
    layers = list(getattr(cache, "layers", ()))
    static = all(
        hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)
        for layer in layers
    )
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
    for target, layer in zip(static.layers, dynamic.layers, strict=True):
        target.update(layer.keys, layer.values)
    setattr(static, _PRUNED_LENGTH, pruned_length(dynamic))


def fix_sliding_lengths(cache: Any) -> None:
    """Set the token counts of a cache's sliding and quantised layers to what they hold.

    Such a layer counts in Python, so the compiled prefill counted the tokens of the whole prompt.
    """
    for layer in getattr(cache, "layers", ()):
        counted, length = getattr(layer, "cumulative_length", None), held_tokens(layer)
        if not isinstance(counted, int) or length is None:
            continue
        quantised = getattr(layer, "_quantized_keys", None) is not None
        sliding = getattr(layer, "is_sliding", False)
        full = counted if quantised else min(counted, layer.sliding_window - 1) if sliding else 0
        if length < full:
            layer.cumulative_length = length
