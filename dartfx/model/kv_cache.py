"""What :func:`dartfx.compile` does to transformers' KV caches around a compiled call.

After a pruned prefill a cache's layers become such as know what they lack
(``runtime/pruned_layers.py``), so that transformers makes positions and masks of later calls.  What
it cannot know is which column of a caller's mask belongs to which token that is left: masks are
gathered before the call.
Static caches have slots for all tokens from the start, so that every decode step has the same
shapes (CUDA graphs); a pruned prefill fills a dynamic cache instead, whose S' tokens in every layer
(uniform) are then copied over, one pass over the KV bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.runtime.pruned_layers import KeptColumns, PrunedLayer, make_pruned

__all__ = [
    "copy_into_static",
    "fit_mask",
    "fitting_masks",
    "held_tokens",
    "is_cache",
    "is_empty_static",
    "mark_pruned",
    "new_dynamic_cache",
    "pruned_length",
    "require_one_length",
    "strip_static_slots",
]


def is_cache(value: Any) -> bool:
    """Whether something is a transformers cache with layers."""
    return hasattr(value, "get_seq_length") and isinstance(getattr(value, "layers", None), list)


def pruned_layers(cache: Any) -> list[PrunedLayer]:
    """The layers of a cache that lack tokens."""
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer) and layer.dropped]


def pruned_length(cache: Any) -> int:
    """How many tokens pruning removed from every row of a transformers cache's shortest layer."""
    return max((layer.dropped for layer in pruned_layers(cache)), default=0)


def require_one_length(cache: Any, tokens: int) -> None:
    """Raise SelectionError where several tokens would continue a cache of the layout "layered".

    transformers makes one mask for all layers, and their columns are not the same tokens.
    """
    if tokens > 1 and any(layer.kept is None for layer in pruned_layers(cache)):
        raise SelectionError(
            f"{tokens} tokens continue a KV cache whose layers hold different tokens of a pruned "
            'prompt (kv_layout="layered"), which no one mask fits. Compile with the default '
            "kv_layout, or decode one token at a time"
        )


def mark_pruned(
    cache: Any, tokens: int, keep_idx: Sequence[Tensor], masks: Sequence[Tensor] = ()
) -> None:
    """Let the layers of a cache that began with this call know which tokens they lack.

    tokens: S; keep_idx: [B, S'] of each graph that returned it; masks: those of the call that
    may be the prompt's, [B, S] or [B, 1, S, S].
    """
    held = {n: length for n, layer in enumerate(cache.layers) if (length := held_tokens(layer))}
    if not keep_idx or not held:
        return
    left, lengths = keep_idx[-1].shape[1], list(held.values())
    if max(lengths) > tokens or lengths[-1] > left:  # the cache of another model, or an older one
        return
    full = [length for n, length in held.items() if not _is_sliding(cache.layers[n])]
    kept = None
    if all(length == left for length in full):
        kept = KeptColumns(tokens, keep_idx[-1], _valid(masks, tokens, keep_idx[-1]))
    for n, length in held.items():
        layer = cache.layers[n]
        if _is_sliding(layer):
            layer.cumulative_length = tokens
            make_pruned(cache.layers, n, tokens - left, kept)
        elif length < tokens:
            if isinstance(getattr(layer, "cumulative_length", None), int):
                # Quantised layers count in Python, where the compiled call counted the prompt's.
                layer.cumulative_length = length
            make_pruned(cache.layers, n, tokens - length, kept)


def _is_sliding(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def _valid(masks: Sequence[Tensor], tokens: int, keep_idx: Tensor) -> Tensor | None:
    """Which of the kept tokens [B, S'] are no pads, by the first mask of the prompt."""
    for mask in masks:
        if mask.ndim == 4 and mask.shape[-2:] == (tokens, tokens):
            mask = mask[:, 0, -1]  # the last token sees all that are no pads
            mask = mask if mask.dtype == torch.bool else mask == 0
        if mask.shape == (keep_idx.shape[0], tokens):
            return mask.bool().gather(1, keep_idx.to(mask.device))
    return None


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


@contextmanager
def fitting_masks(caches: Sequence[Any]) -> Iterator[None]:
    """Let pruned layers know that masks are gathered for them inside the ``with`` block."""
    layers = [layer for cache in caches for layer in pruned_layers(cache)]
    for layer in layers:
        layer.masks_fit = True
    try:
        yield
    finally:
        for layer in layers:
            layer.masks_fit = False


def fit_mask(cache: Any, mask: Tensor, tokens: int) -> Tensor:
    """A mask for ``tokens`` more tokens on a pruned cache, with the columns that the cache has.

    mask: [B, columns] or [B, 1, tokens, columns], for all tokens seen so far and the new ones, or
    for those that the cache holds and the new ones.  transformers reads the last columns of the
    former kind, so those of kept tokens go there, in the places of what was dropped are zeros.
    Raises SelectionError for another length or number of rows.
    """
    layer = next((each for each in pruned_layers(cache) if each.kept is not None), None)
    if layer is None or layer.kept is None:
        return mask
    kept, dropped = layer.kept, layer.dropped
    if hasattr(layer, "max_cache_len") and mask.ndim == 4:
        return _without_pads(mask, kept)
    length = mask.shape[-1]
    seen = layer.get_seq_length() + tokens
    if length not in (seen, seen - dropped):
        raise SelectionError(
            f"an attention mask of {length} columns came with {tokens} tokens and a cache that "
            f"holds {seen - tokens - dropped} of {seen - tokens} tokens; give one of {seen} "
            f"columns, for all tokens, or of {seen - dropped}, for those that are left"
        )
    if len(mask) != len(kept.keep_idx):
        raise SelectionError(
            f"an attention mask of {len(mask)} rows came with a cache that was pruned with "
            f"{len(kept.keep_idx)} rows; give generate the batch as it will be decoded"
        )
    keep_idx = kept.keep_idx.to(mask.device)
    if length == seen:
        if mask.ndim == 4:
            keep_idx = keep_idx[:, None, None].expand(*mask.shape[:3], -1)
        old, new = mask[..., : kept.prompt], mask[..., kept.prompt :]
        mask = torch.cat([old.gather(-1, keep_idx), new], -1)
    return mask if mask.ndim == 4 else torch.nn.functional.pad(mask, (dropped, 0))


def _without_pads(mask: Tensor, kept: KeptColumns) -> Tensor:
    """A static cache's mask [B, 1, t, slots], as ``generate`` makes it, with pads hidden."""
    if kept.valid is None:
        return mask
    hidden = torch.zeros(len(mask), 1, 1, mask.shape[-1], dtype=torch.bool, device=mask.device)
    hidden[..., : kept.valid.shape[1]] = ~kept.valid.to(mask.device)[:, None, None]
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden, lowest)


def is_empty_static(cache: Any) -> bool:
    """Whether a transformers cache is static in all layers and holds no token yet.

    Static sliding-window layers do not count: which slot they write depends on the whole prompt.
    """
    layers = list(getattr(cache, "layers", ()))
    static = all(hasattr(layer, "max_cache_len") and not _is_sliding(layer) for layer in layers)
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
