"""Pads prompts to few lengths, so that few recordings serve them all.

A pad is a token in front of the prompt that attention masks.  It is removed from the call's
results: the caches hold no column for it, and positions do not count it.
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

# Arguments as long as the prompt, and the pad value in each; the pad's id depends on the model.
_PADS = {_MASK: 0, "token_type_ids": 0, "mm_token_type_ids": 0, _POSITIONS: 1}

# With these, a call returns or takes more of the prompt than padding can handle.
_MORE = ("labels", "inputs_embeds", "cache_position", "output_hidden_states", "output_attentions")


def is_plain_prefill(named: Mapping[str, Any], caches: Sequence[Any]) -> bool:
    """Whether a call is one row's prefill as made by ``generate``, which may be padded.

    That is: token ids with positions, one empty cache that grows in every layer, no other argument
    as long as the prompt, and only the last tokens' logits as result.
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
        return False  # pads could remain in an unknown one
    mask = named.get(_MASK)  # for a static cache: [B, 1, S, slots], or one per kind of layer
    return (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)) and _grows(caches[0])


def _grows(cache: Any) -> bool:
    growing = all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
    return growing and not cache.get_seq_length()


def without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove a mask that hides nothing: attention is causal without it, too.

    Reads the mask once (a host synchronisation, before anything of the call is queued).
    """
    mask = kwargs.get(_MASK)
    if isinstance(mask, Tensor) and bool(mask.all()):
        return {name: value for name, value in kwargs.items() if name != _MASK}
    return kwargs


def padded(kwargs: Mapping[str, Any], pads: int, token: Any) -> dict[str, Any]:
    """Put ``pads`` pads in front, and always add a mask, so that all calls look alike.

    token: the id of a pad, an int or a tensor; not an image token.
    """
    ids = kwargs[_IDS]
    found = {_MASK: torch.ones_like(ids), **{k: v for k, v in kwargs.items() if v is not None}}
    for name, value in _PADS.items():
        if name in found:
            found[name] = torch.nn.functional.pad(found[name], (pads, 0), value=value)
    front = torch.full_like(ids[:, :1], token) if isinstance(token, int) else token
    return found | {_IDS: torch.cat([front.expand(-1, pads), ids], 1)}


def crop_caches(caches: Sequence[Any], pads: int) -> None:
    """Remove the pads' columns, the first ones, from all layers that the call filled."""
    for cache in caches:
        for layer in cache.layers:
            layer.keys = layer.keys[..., pads:, :].contiguous()
            layer.values = layer.values[..., pads:, :].contiguous()


def cropped(record: KeepIdxRecord, pads: int) -> KeepIdxRecord:
    """The record for the prompt without its pads."""
    sizes = None if record.log_sizes is None else record.log_sizes[:, pads:]
    return replace(record, keep_idx=record.keep_idx[:, pads:] - pads, log_sizes=sizes)
