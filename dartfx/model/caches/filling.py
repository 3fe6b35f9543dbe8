"""Caches that no graph fills: static and offloaded ones.

A static cache has slots for all tokens from the start, so that every decode step has the same
shapes (CUDA graphs); an offloaded one moves its layers in separate streams.  A call with an image
fills a growing cache instead, whose new tokens in every layer (uniform) are then copied over, one
pass over the KV bytes.  Slots are allocated at the first copy, and only those that the tokens left
can come to need.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx import compat
from dartfx.errors import SelectionError
from dartfx.model.caches.counting import uncounted
from dartfx.model.caches.kv_cache import (
    fit_mask,
    held_in_slots,
    is_sliding,
    is_static,
    pruned_length,
    slots_of,
)
from dartfx.model.caches.pruned_layers import PrunedLayer, make_pruned
from dartfx.passes.refusal import Declined

__all__ = [
    "cache_to_fill",
    "copy_new_tokens",
    "growing_copy",
    "is_offloaded",
    "note_most_tokens",
    "racing",
    "strip_free_slots",
    "unfit",
]


def is_offloaded(cache: Any) -> bool:
    """Whether a transformers cache moves layers between the host and the device."""
    return bool(getattr(cache, "offloading", False))


def racing(caches: Sequence[Any]) -> Declined | None:
    """Why a call runs as it would without dartfx on an offloaded cache, or None."""
    if not (any(map(is_offloaded, caches)) and compat.offloaded_caches_race()):
        return None
    version = importlib.metadata.version("transformers")
    return Declined(
        f"an offloaded KV cache (cache_implementation or DynamicCache(offloading=True)): "
        f"transformers {version} copies its layers back to the device in a stream that does not "
        "wait until they have left it, so that attention may read anything, with and without "
        "dartfx",
        advice="transformers>=5.20, where the streams wait for each other; a cache on the device",
    )


def cache_to_fill(caches: Sequence[Any], tokens: int, brings_image: bool) -> Any:
    """The cache that a call's tokens should get into by way of a growing one, or None.

    That is one to which an image comes, if it is empty or has full attention only, or an empty
    static one.
    """
    for cache in caches:
        static = is_static(cache)
        if static or (brings_image and is_offloaded(cache) and _holds_tokens(cache)):
            # On a GPU it waits for the device to ask for a length, which no decode step should.
            empty = not (cache.layers and cache.layers[0].is_initialized)
            empty = empty or (tokens > 1 and held_in_slots(cache) == 0)
            windows = any(map(is_sliding, cache.layers))
            if (static and empty) or (brings_image and (empty or not windows)):
                return cache
    return None


def _holds_tokens(cache: Any) -> bool:
    """Whether every layer holds tokens; recurrent ones do not."""
    return all(hasattr(layer, "get_seq_length") for layer in cache.layers)


def unfit(caches: Sequence[Any]) -> Declined | None:
    """Why an image is not pruned on these caches, if it is not.

    A window may have let go of tokens before it, or layers keep tokens in a way of their own.
    """
    for cache in caches:
        if any(map(is_sliding, cache.layers)) and held_in_slots(cache):
            return Declined(
                "vision tokens come on sliding-window caches that already hold tokens",
                advice="the whole conversation without past_key_values",
            )
    return uncounted(caches)


def growing_copy(cache: Any) -> Any:
    """A growing cache that holds what another one holds."""
    dynamic = sys.modules["transformers"].DynamicCache()
    held = held_in_slots(cache)
    if held and is_offloaded(cache):
        torch.accelerator.synchronize()  # a layer may be in transfer, on another stream
    for n, layer in enumerate(cache.layers if held else ()):
        keys, values = layer.keys[:, :, :held], layer.values[:, :, :held]
        dynamic.update(keys.to(layer.device), values.to(layer.device), n)
        if isinstance(layer, PrunedLayer):
            make_pruned(dynamic.layers, n, layer.dropped, layer.kept)
    return dynamic


def strip_free_slots(static: Any, mask: Any, tokens: int) -> Any:
    """An attention mask for ``tokens`` more tokens without the columns of free slots.

    transformers makes it before the model, [B, 1, tokens, slots], or one per kind of layer in a
    dict; a mask [B, columns] or None is returned unchanged.
    """
    if isinstance(mask, dict):
        return {kind: strip_free_slots(static, each, tokens) for kind, each in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return fit_mask(static, mask, tokens)[..., : held_in_slots(static) + tokens]
    return mask


def note_most_tokens(static: Any, tokens: int) -> None:
    """Note how many tokens ``generate`` may come to on the new static cache that it makes.

    transformers makes it no shorter than the one before, whatever this prompt needs.
    """
    static.most_tokens = tokens


def copy_new_tokens(cache: Any, dynamic: Any, least: int = 0) -> int:
    """Copy what ``dynamic`` holds beyond ``cache``, of which it was a copy, into that one.

    least: slots that a pruned cache of ``generate`` gets at least, those of an earlier one, so that
    decode keeps its shapes.  Returns how many such a one got, or ``least``.  Raises SelectionError
    where they are too few, or layers hold different numbers of tokens, which no one mask could fit.
    """
    by_generate = "most_tokens" in vars(cache)
    held, lengths = held_in_slots(cache), {layer.keys.shape[-2] for layer in dynamic.layers}
    slots = _slots(cache, pruned_length(dynamic), least) if is_static(cache) else None
    room = [each for each in (slots_of(cache), slots) if each is not None]
    alike = len(lengths) == 1 and len(cache.layers) in (0, len(dynamic.layers))
    if not alike or max(lengths) > min(room, default=max(lengths)):
        raise SelectionError(
            f"KV caches of {len(dynamic.layers)} layers with {sorted(lengths)} tokens do not fit a "
            f"cache of {len(cache.layers)} layers with {min(room, default=0)} slots"
        )
    for n, layer in enumerate(dynamic.layers):
        if isinstance(layer, PrunedLayer) and slots is not None:
            make_pruned(cache.layers, n, layer.dropped, layer.kept)
            cache.layers[n].shorten(slots)
        cache.update(layer.keys[:, :, held:], layer.values[:, :, held:], n)
        if isinstance(layer, PrunedLayer):
            make_pruned(cache.layers, n, layer.dropped, layer.kept)
            cache.layers[n].offloaded = is_offloaded(cache)
            if not is_static(cache) and is_sliding(cache.layers[n]):
                cache.layers[n].cumulative_length = int(layer.get_seq_length())
    return slots if by_generate and slots is not None else least


def _slots(static: Any, dropped: int, least: int) -> int | None:
    """How many slots a pruned cache gets that has none yet; None for any other.

    Up to an eighth more than needed, so that prompts of other sizes have caches of few lengths.
    """
    most: int | None = vars(static).pop("most_tokens", None)
    if most is None:  # a caller's own
        most, least = slots_of(static), 0
    if static.layers[0].is_initialized or not dropped or not most:
        return None
    left = most - dropped
    step = 1 << max(left.bit_length() - 4, 0)
    return max(least, -(-left // step) * step)
