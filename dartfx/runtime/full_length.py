"""Logits or hidden states of a pruned call at the prompt's length, for code that expects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.runtime.kept_positions import kept_positions

__all__ = ["restore_length"]


def restore_length(result: Any, length: int) -> Any:
    """The result of a call with logits [B, S, V] in place of pruned ones [B, S', V].

    Of a model without a head, the last hidden states.  A dropped token's are those of the last kept
    token before it, so the label of a token that follows a dropped one is predicted from what
    precedes it in the pruned sequence.  length: S; raises SelectionError where the call's arguments
    do not say it (0).
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
