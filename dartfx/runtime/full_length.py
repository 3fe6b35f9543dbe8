"""Restores logits or hidden states of a pruned call to the prompt's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.runtime.kept_positions import kept_positions

__all__ = ["restore_length"]


def restore_length(result: Any, length: int) -> Any:
    """Replace a call's pruned logits [B, S', V] by logits [B, S, V].

    For a model without a head: the last hidden states.  A dropped token gets those of the last kept
    token before it, so the label of a token after a dropped one is predicted from its predecessor
    in the pruned sequence.  length: S; raises SelectionError if it is 0, that is, the call's
    arguments do not determine it.
    """
    if isinstance(result, Tensor):
        return _restored(result, length)
    if isinstance(result, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(value := result.get(name), Tensor):
                result[name] = _restored(value, length)  # type: ignore[index]
        return result
    if not isinstance(result, Sequence):
        return result
    parts = list(result)
    for at, part in enumerate(parts):
        if isinstance(part, Tensor) and kept_positions(part) is not None:
            parts[at] = _restored(part, length)
            break  # logits come before hidden states
    return tuple(parts)


def _restored(value: Tensor, length: int) -> Tensor:
    if (keep_idx := kept_positions(value)) is None:
        return value
    if not length:
        raise SelectionError('logits="full" needs a call with input_ids or inputs_embeds')
    positions = torch.arange(length, device=keep_idx.device).repeat(len(keep_idx), 1)
    before = torch.searchsorted(keep_idx, positions, right=True) - 1
    index = before.clamp(min=0).to(value.device)
    return value.gather(1, index.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
