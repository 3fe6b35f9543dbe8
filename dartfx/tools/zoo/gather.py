"""Gathers a decoder layer's tensors by ``keep_idx``, so that only kept tokens remain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Late", "gather_argument", "take", "take_tokens"]

# The token dimension of each argument that decoder layers take, counted from the end; the batch
# is the dimension before it, or dim 0 of tables and masks with heads. By name, never by size, so
# that equal sizes cannot mislead.
_LAST = {"position_ids", "moe_mm_token_type_ids"}
_LAST_BUT_ONE = {"position_embeddings", "per_layer_input"}


class Late:
    """A stand-in for a DeepStack tensor, which the decoder moves to a device on each use."""

    def __init__(self, now: Callable[[], Tensor]) -> None:
        self._now = now

    def to(self, *_: Any) -> Tensor:
        return self._now()


def take(tensor: Tensor, keep_idx: Tensor, dim: int, batch_dim: int = 0) -> Tensor:
    """Gather ``tensor`` along ``dim`` by each row's indices.

    tensor: B or 1 at ``batch_dim``, S at ``dim``; keep_idx: [B, S'].  Returns S' at ``dim``.
    """
    rows, kept = keep_idx.shape
    if rows == 1 == tensor.shape[batch_dim]:
        return tensor.index_select(dim, keep_idx[0])
    wanted = list(tensor.shape)
    wanted[batch_dim] = rows
    source = tensor.expand(wanted)
    shape = [1] * source.dim()
    shape[batch_dim], shape[dim] = rows, kept
    wanted[dim] = kept
    return source.gather(dim, keep_idx.view(shape).expand(wanted))


def take_tokens(tensor: Tensor, keep_idx: Tensor, dim: int) -> Tensor:
    """As :func:`take`, with ``dim`` counted from the end and the batch in the dim before it."""
    dim = tensor.dim() + dim
    return take(tensor, keep_idx, dim, dim - 1)


def _gather_mask(mask: Tensor, keep_idx: Tensor, last_only: bool) -> Tensor:
    if mask.dim() == 2:
        return take(mask, keep_idx, 1)
    if mask.dim() != 4:
        raise TypeError(f"decoder layer got a mask of shape {tuple(mask.shape)}, not 2-D or 4-D")
    return take(mask if last_only else take(mask, keep_idx, 2), keep_idx, 3)


def gather_argument(name: str, value: Any, keep_idx: Tensor, last_only: bool) -> Any:
    """Reduce one argument of a decoder layer to the kept tokens.

    last_only: the layer gets only the last token as query, and only its rows of all tables.
    """
    if isinstance(value, dict):
        return {k: gather_argument(name, v, keep_idx, last_only) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(gather_argument(name, v, keep_idx, last_only) for v in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return _gather_mask(value, keep_idx, last_only)
    dim = -1 if name in _LAST else -2 if name in _LAST_BUT_ONE else 0
    if dim == 0:
        raise TypeError(
            f"decoder layer got {name} of shape {tuple(value.shape)}, and it is not known which of "
            f"its dimensions are tokens; add it to dartfx/tools/zoo/gather.py"
        )
    if last_only and value.shape[dim] == 1:
        return value
    return take_tokens(value, keep_idx, dim)
