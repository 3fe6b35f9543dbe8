"""A call's arguments by their role, however they are passed: by position, by name, nested."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.model.caches import kv_cache
from dartfx.model.caches.calibration import calibrated_mask, is_calibrated
from dartfx.token_map.infer_layout import frame_lengths

__all__ = [
    "Arguments",
    "brings_media",
    "leaves_of",
    "may_be_mask",
    "swapped",
    "with_decode_masks",
]

_MASK = "attention_mask"
_DEPTH = 4  # of lists and dicts inside each other


class Arguments:
    """The arguments of one call; ``signature`` names those that were passed by position."""

    def __init__(
        self,
        signature: Callable[[], inspect.Signature | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.args, self.kwargs, self._signature = args, kwargs, signature

    @classmethod
    def of(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments:
        """The arguments of a call of a module with this ``forward``."""
        return cls(lambda: _signature(forward), args, kwargs)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Every argument by its name; by ``argument 0`` where the signature gives none."""
        signature = self._signature() if self.args else None
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [
            name
            for name, parameter in (signature.parameters.items() if signature else ())
            if parameter.kind in positional
        ]
        names += [f"argument {i}" for i in range(len(names), len(self.args))]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @cached_property
    def kind(self) -> frozenset[str]:
        """The names of the arguments that hold something: calls of one kind trace alike."""
        return frozenset(name for name, value in self.named.items() if value is not None)

    @cached_property
    def leaves(self) -> list[tuple[str, Any]]:
        """The leaves of lists and dicts, each with the innermost name."""
        return [leaf for name, value in self.named.items() for leaf in leaves_of(name, value)]

    @cached_property
    def caches(self) -> list[Any]:
        """transformers' KV caches among the arguments."""
        return [value for _, value in self.leaves if kv_cache.is_cache(value)]

    @cached_property
    def tokens(self) -> int:
        """How many tokens of each row the call computes; 0 where its arguments do not say."""
        tensors = {name: value for name, value in self.leaves if isinstance(value, Tensor)}
        for name in ("inputs_embeds", "input_ids"):
            if name in tensors and tensors[name].ndim > 1:
                return int(tensors[name].shape[1])
        for name, value in tensors.items():
            if value.ndim == 2 and value.dtype in (torch.int32, torch.int64) and "mask" not in name:
                return int(value.shape[1])
        return 0

    def frame_lengths(self, runs: list[int]) -> list[int]:
        """As :func:`dartfx.token_map.infer_layout.frame_lengths` of this call."""
        return frame_lengths(self.named, runs)

    @property
    def pad_masks(self) -> list[Tensor]:
        """Masks that may say which tokens are pads; token ids do not, and 0 is like others."""
        leaves = [leaf for leaf in self.leaves if may_be_mask(*leaf)]
        return [t for name, t in leaves if "mask" in name or t.dtype == torch.bool]

    @cached_property
    def media(self) -> list[str]:
        """Arguments that may bring vision tokens; none in a decode step."""
        if self.tokens == 1 and (self.caches or self.named.get("past_key_values") is not None):
            return []
        return [name for name, value in self.named.items() if _has_media(name, value)]

    def with_swaps(self, swaps: Mapping[int, Any]) -> Arguments:
        """The same call with the objects of these ``id`` replaced."""
        if not swaps:
            return self
        args = tuple(swapped(value, swaps) for value in self.args)
        kwargs = {name: swapped(value, swaps) for name, value in self.kwargs.items()}
        return Arguments(self._signature, args, kwargs)


def brings_media(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments may bring vision tokens, in code that dynamo traces."""
    for name, value in [("", value) for value in args] + list(kwargs.items()):
        parts = value if isinstance(value, list | tuple) and name != "past_key_values" else [value]
        for part in parts:
            if _is_media(name, part) and not (name == "inputs_embeds" and part.shape[1] == 1):
                return True
    return False


def _is_media(name: str, value: Any) -> bool:
    """Pixels, features and embeddings are floats, pixels perhaps bytes; masks bring nothing."""
    if not isinstance(value, Tensor) or name.endswith("mask") or name == "past_key_values":
        return False
    if value.dtype == torch.uint8:
        return value.ndim > 2
    return value.is_floating_point() and value.ndim > 1


def _has_media(name: str, value: Any) -> bool:
    return any(_is_media(inner, part) for inner, part in leaves_of(name, value))


def _signature(forward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def leaves_of(name: str, value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    if depth and isinstance(value, Mapping):
        for key, part in value.items():
            # A mask per kind of layer is a mask still.
            inner = key if isinstance(key, str) and not name.endswith("mask") else name
            yield from leaves_of(inner, part, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for part in value:
            yield from leaves_of(name, part, depth - 1)
    else:
        yield name, value


def swapped(value: Any, swaps: Mapping[int, Any], depth: int = _DEPTH) -> Any:
    """``value`` with the swaps applied, copied as far as needed."""
    if id(value) in swaps:
        return swaps[id(value)]
    if not depth or not isinstance(value, Mapping | list | tuple):
        return value
    parts = value.values() if isinstance(value, Mapping) else value
    made = [swapped(part, swaps, depth - 1) for part in parts]
    if all(new is old for new, old in zip(made, parts, strict=True)):
        return value
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, part in zip(value, made, strict=True):
            changed[key] = part
        return changed
    return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)


def with_decode_masks(call: Arguments, caches: Sequence[Any]) -> Arguments:
    """The call with its masks gathered like the caches."""
    swaps = {}
    for kv in filter(kv_cache.pruned_length, caches):
        for name, value in call.leaves:
            if may_be_mask(name, value) and _covers(kv, name, value, call.tokens):
                swaps[id(value)] = kv_cache.fit_mask(kv, value, call.tokens)
    fitted = call.with_swaps(swaps)
    calibrated = next(filter(is_calibrated, caches), None)
    return fitted if calibrated is None else _with_calibrated_mask(fitted, calibrated)


def _with_calibrated_mask(call: Arguments, kv: Any) -> Arguments:
    """The call with the mask that calibrated keys need.  Raises SelectionError as that does."""
    if _MASK in call.named and _MASK not in call.kwargs:
        raise SelectionError(
            f"{_MASK} came by position with a calibrated KV cache; pass it by name"
        )
    made = calibrated_mask(kv, call.kwargs.get(_MASK), call.tokens)
    return Arguments(call._signature, call.args, call.kwargs | {_MASK: made})


def _covers(kv: Any, name: str, value: Tensor, tokens: int) -> bool:
    """Whether a mask has columns for what a cache has seen, and not for a call's tokens only."""
    if name == "attention_mask":
        return True
    # A static cache's length is on its device, for which no decode step should wait.
    return value.shape[-1] > tokens and value.shape[-1] == int(kv.get_seq_length()) + tokens


def may_be_mask(name: str, value: Any) -> bool:
    """Whether an argument may be an attention mask, whatever its name."""
    if not isinstance(value, Tensor) or value.ndim not in (2, 4):
        return False
    return name == "attention_mask" or (value.ndim == 2 and not value.is_floating_point())
