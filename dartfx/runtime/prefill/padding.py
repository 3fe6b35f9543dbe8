"""Prompts padded to few lengths, so that few recordings serve them all.

A pad is a token in front of the prompt that attention masks.  It is removed from what the call
returns: the caches hold no column of it, and positions count without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dartfx.runtime.keep_idx import KeepIdxRecord

__all__ = ["crop_caches", "cropped", "is_plain_prefill", "padded", "without_mask"]

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"

# Arguments of a prompt's length, and the value of a pad in them; ids are the model's own.
_PADS = {_MASK: 0, "token_type_ids": 0, "mm_token_type_ids": 0, _POSITIONS: 1}

# With these a call returns or takes more of the prompt than padding knows of.
_MORE = ("labels", "inputs_embeds", "cache_position", "output_hidden_states", "output_attentions")


def is_plain_prefill(named: Mapping[str, Any], caches: Sequence[Any]) -> bool:
    """Whether a call is one row's prefill as ``generate`` makes it, which may be padded.

    That is token ids with their positions, one cache, which is empty and grows in every layer, no
    other argument of the prompt's length, and no more wanted than the last tokens' logits.
    caches: those of the call and of the model.
    """
    ids = named.get(_IDS)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        return False
    if not named.get("logits_to_keep") or any(named.get(name) for name in _MORE if name in named):
        return False
    length = ids.shape[1:]
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    long = {n for n, t in given.items() if t.shape[-1:] == length and not t.is_floating_point()}
    mine = given.keys() & _PADS.keys()
    if _POSITIONS not in given or long - {_IDS} != mine:
        return False
    if len(caches) != 1 or caches[0] is not named.get("past_key_values"):
        return False  # pads could stay in one that is not known
    mask = named.get(_MASK)  # of a static cache: [B, 1, S, slots], or one per kind of layer
    return (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)) and _grows(caches[0])


def _grows(cache: Any) -> bool:
    growing = all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
    return growing and not cache.get_seq_length()


def without_mask(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without a mask that hides nothing: attention is causal without one, too.

    Reads the mask once (a host synchronisation, while nothing of the call is queued yet).
    """
    mask = kwargs.get(_MASK)
    if isinstance(mask, Tensor) and bool(mask.all()):
        return {name: value for name, value in kwargs.items() if name != _MASK}
    return dict(kwargs)


def padded(kwargs: Mapping[str, Any], pads: int, token: Any) -> dict[str, Any]:
    """The arguments with ``pads`` pads in front, and a mask in any case, so that calls are alike.

    token: the id of a pad, an int or a tensor; not that of an image.
    """
    ids = kwargs[_IDS]
    found = {_MASK: torch.ones_like(ids), **{k: v for k, v in kwargs.items() if v is not None}}
    for name, value in _PADS.items():
        if name in found:
            found[name] = torch.nn.functional.pad(found[name], (pads, 0), value=value)
    front = torch.full_like(ids[:, :1], token) if isinstance(token, int) else token
    return found | {_IDS: torch.cat([front.expand(-1, pads), ids], 1)}


def crop_caches(caches: Sequence[Any], pads: int) -> None:
    """Remove the columns of the pads, the first ones, from all layers that the call filled."""
    for cache in caches:
        for layer in cache.layers:
            layer.keys = layer.keys[..., pads:, :].contiguous()
            layer.values = layer.values[..., pads:, :].contiguous()


def cropped(record: KeepIdxRecord, pads: int) -> KeepIdxRecord:
    """What was kept of the prompt without its pads."""
    return replace(record, keep_idx=record.keep_idx[:, pads:] - pads)
