"""Static caches, which have slots for all tokens from the start.

So every decode step has the same shapes (CUDA graphs).  A call with an image fills a dynamic cache
instead, whose new tokens in every layer (uniform) are then copied over, one pass over the KV bytes.
Slots are allocated at the first copy, and only those that the tokens left can come to need.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.model.caches.kv_cache import (
    fit_mask,
    held_in_slots,
    is_sliding,
    is_static,
    pruned_length,
    slots_of,
)
from dartfx.model.caches.pruned_layers import PrunedLayer, make_pruned

__all__ = [
    "copy_new_tokens",
    "growing_copy",
    "note_most_tokens",
    "static_to_fill",
    "strip_free_slots",
]


def static_to_fill(caches: Sequence[Any], tokens: int, brings_image: bool) -> Any:
    """The static cache that a call's tokens should get into by way of a dynamic one, or None.

    That is one that holds no token yet, or one of full attention where the call brings an image.
    """
    for cache in filter(is_static, caches):
        # On a GPU it waits for the device to ask for a length, which no decode step should.
        if not cache.layers[0].is_initialized or (tokens > 1 and held_in_slots(cache) == 0):
            return cache
        if brings_image and not any(map(is_sliding, cache.layers)):
            return cache
    return None


def growing_copy(static: Any) -> Any:
    """A dynamic cache that holds what a static one holds."""
    dynamic = sys.modules["transformers"].DynamicCache()
    held = held_in_slots(static)
    for n, layer in enumerate(static.layers if held else ()):
        dynamic.update(layer.keys[:, :, :held], layer.values[:, :, :held], n)
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


def copy_new_tokens(static: Any, dynamic: Any, least: int = 0) -> int:
    """Copy what ``dynamic`` holds beyond ``static``, of which it was a copy, into that one.

    least: slots that a pruned cache gets at least, those of an earlier one, so that decode keeps
    its shapes.  Returns how many this one got, or ``least``.  Raises SelectionError where there are
    too few, or the layers hold different numbers of tokens, which one decode mask could not fit.
    """
    held, lengths = held_in_slots(static), {layer.keys.shape[-2] for layer in dynamic.layers}
    slots = _slots(static, pruned_length(dynamic), least)
    room = [each for each in (slots_of(static), slots) if each is not None]
    alike = len(lengths) == 1 and len(dynamic.layers) == len(static.layers)
    if not alike or max(lengths) > min(room, default=max(lengths)):
        raise SelectionError(
            f"KV caches of {len(dynamic.layers)} layers with {sorted(lengths)} tokens do not fit a "
            f"static cache of {len(static.layers)} layers with {min(room, default=0)} slots"
        )
    for n, layer in enumerate(dynamic.layers):
        if isinstance(layer, PrunedLayer):
            make_pruned(static.layers, n, layer.dropped, layer.kept)
            if slots is not None:
                static.layers[n].shorten(slots)
        static.layers[n].update(layer.keys[:, :, held:], layer.values[:, :, held:])
    return least if slots is None else slots


def _slots(static: Any, dropped: int, least: int) -> int | None:
    """How many slots a pruned cache gets that has none yet; None for any other.

    Up to an eighth more than needed, so that prompts of other sizes have caches of few lengths.
    """
    most: int | None = vars(static).pop("most_tokens", slots_of(static))
    if static.layers[0].is_initialized or not dropped or not most:
        return None
    left = most - dropped
    step = 1 << max(left.bit_length() - 4, 0)
    return max(least, -(-left // step) * step)
