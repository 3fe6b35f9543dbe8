"""Checks of the selection's arguments that read no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from dartfx.errors import SelectionError
from dartfx.selection.batch_rule import Size

__all__ = ["check_arguments", "check_counts", "check_vision_tokens", "fail"]


def check_arguments(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    queries: Tensor | None = None,
    tower_attention: Tensor | None = None,
) -> None:
    """Raise SelectionError for the first tensor of wrong type, rank, shape, dtype or device."""
    _check_float("hidden", hidden, "[B, S, D]", 3)
    _check_float("keys", keys, "[B, H, S, Dh]", 4)
    batch, sequence = hidden.shape[:2]
    if guard_or_false(batch == 0):
        raise fail("hidden", f"must hold at least one row, got shape {tuple(hidden.shape)}")
    if _differ((keys.shape[0], keys.shape[2]), (batch, sequence)):
        raise fail(
            "keys",
            f"must be [B, H, S, Dh] with B = {batch} and S = {sequence} as in hidden, "
            f"got shape {tuple(keys.shape)}",
        )
    _check_mask("vision_mask", vision_mask, hidden)
    if valid_mask is not None:
        _check_mask("valid_mask", valid_mask, hidden)
    if queries is not None:
        _check_queries(queries, keys)
    if tower_attention is not None:
        _check_float("tower_attention", tower_attention, "[B, S]", 2)
        _check_shape("tower_attention", tower_attention, hidden)
    for name, tensor in (
        ("keys", keys),
        ("vision_mask", vision_mask),
        ("valid_mask", valid_mask),
        ("queries", queries),
        ("tower_attention", tower_attention),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise fail(name, f"is on {tensor.device}, but hidden is on {hidden.device}")


def check_counts(**counts: object) -> None:
    """Raise SelectionError unless these numbers are ints of at least 0."""
    for name, value in counts.items():
        _check_count(name, value)


def check_vision_tokens(vision_tokens: object, hidden: Tensor) -> None:
    """Raise SelectionError unless N, the vision tokens per row, is an int of 1 to S."""
    _check_count("vision_tokens", vision_tokens, at_least=1)
    if statically_known_true(vision_tokens > hidden.shape[1]):  # type: ignore[operator]
        raise fail(
            "vision_tokens", f"must be at most S = {hidden.shape[1]} of hidden, got {vision_tokens}"
        )


def fail(name: str, problem: str) -> SelectionError:
    """The error that says what is wrong with argument ``name``."""
    return SelectionError(f"dartfx.select_tokens: {name} {problem}")


def _differ(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) != len(b) or any(guard_or_false(x != y) for x, y in zip(a, b, strict=True))


def _check_float(name: str, tensor: object, shape: str, rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise fail(name, f"must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise fail(name, f"must be a floating-point tensor, got {tensor.dtype}")
    if tensor.dim() != rank:
        raise fail(name, f"must be {shape}, got shape {tuple(tensor.shape)}")


def _check_queries(queries: object, keys: Tensor) -> None:
    _check_float("queries", queries, "[B, Hq, S, Dh]", 4)
    assert isinstance(queries, Tensor)
    batch, heads, sequence, width = queries.shape
    groups = guard_or_false(heads % keys.shape[1] != 0)
    if groups or _differ((batch, sequence, width), (keys.shape[0], *keys.shape[2:])):
        raise fail(
            "queries",
            "must be [B, Hq, S, Dh] as keys, with a multiple of their heads, "
            f"got shape {tuple(queries.shape)} with keys of {tuple(keys.shape)}",
        )


def _check_mask(name: str, mask: object, hidden: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise fail(name, f"must be a bool tensor, got {kind}; compare or call .bool() first")
    _check_shape(name, mask, hidden)


def _check_shape(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if _differ(tensor.shape, hidden.shape[:2]):
        raise fail(
            name,
            f"must be [B, S] = {tuple(hidden.shape[:2])} as in hidden, "
            f"got shape {tuple(tensor.shape)}",
        )


def _check_count(name: str, value: object, at_least: int = 0) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise fail(name, f"must be an int, got {type(value).__name__}")
    # What symbolic counts turn out to be is not worth a guard each.
    if statically_known_true(value < at_least):
        raise fail(name, f"must be at least {at_least}, got {value}")
