"""How many tokens the layers of a KV cache hold, and which layers keep them uncounted.

transformers' models may define further cache layers, which keep tokens under other
names.  Such a layer cannot be made to know what it lacks, so nothing is pruned into it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.passes.refusal import Declined

__all__ = ["held_tokens", "note_uncounted", "require_counted", "uncounted"]

# Classes of cache layers, and whether what they hold is counted right.
_counted: dict[type, bool] = {}


def held_tokens(layer: Any) -> int | None:
    """How many tokens of each row a cache layer holds; None where that is not known.

    Quantised layers hold their first tokens in codes, and keep an empty tensor as their keys.
    """
    keys, codes = getattr(layer, "keys", None), getattr(layer, "_quantized_keys", None)
    plain = keys.shape[-2] if isinstance(keys, Tensor) and keys.ndim == 4 else None
    if codes is None:
        return plain
    stored, *more = codes if isinstance(codes, tuple) else (codes,)
    # HQQ packs codes; other quantisers store one for each value.
    shape = more[0].get("shape", ()) if more and isinstance(more[0], dict) else stored.shape
    return int(shape[-2]) + (plain or 0) if len(shape) == 4 else None


def uncounted(caches: Iterable[Any]) -> Declined | None:
    """Why an image is not pruned into these caches: a layer keeps tokens in a way of its own."""
    for layer in (layer for cache in caches for layer in cache.layers):
        if not _counts(layer):
            return Declined(
                f"layers of the KV cache ({type(layer).__name__}) keep tokens in a way of their "
                "own, so they could not know which ones were dropped",
                advice="please report the class; meanwhile this call runs unpruned",
            )
    return None


def _counts(layer: Any) -> bool:
    """Whether a layer's tokens are counted right, tried on an empty one of a model's own class."""
    kind = type(layer)
    tried = hasattr(layer, "get_seq_length") and not getattr(layer, "is_initialized", True)
    if not tried or kind.__module__ == "transformers.cache_utils":
        return True
    if kind not in _counted:
        _counted[kind] = hasattr(layer, "max_cache_len") or _trial(layer) in (2, None)
    return _counted[kind]


def _trial(layer: Any) -> int | None:
    """How many tokens a copy of an empty layer holds after two; None where it takes no such call.

    What nobody can try is seen afterwards, by :func:`note_uncounted`.
    """
    trial, states = copy.copy(layer), torch.zeros(1, 1, 2, 2)
    try:
        trial.update(states, states)
    except Exception:  # of a model's own class: it may want anything
        return None
    return held_tokens(trial) or 0


def note_uncounted(cache: Any) -> None:
    """Note on a cache that pruned tokens came into layers which cannot know what they lack."""
    for layer in cache.layers:
        if hasattr(layer, "get_seq_length") and not held_tokens(layer) and layer.get_seq_length():
            cache.uncounted = type(layer).__name__


def require_counted(cache: Any) -> None:
    """Raise SelectionError where tokens would continue such a cache."""
    if (kind := vars(cache).get("uncounted")) is not None:
        raise SelectionError(
            f"this KV cache was filled by a pruned prompt, and its layers ({kind}) keep tokens in "
            "a way of their own, so they do not know which ones they lack; give the whole "
            "conversation to generate, which does not prune into such layers"
        )
