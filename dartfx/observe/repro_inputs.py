"""Inputs for ``repro.py``: the call's own integers and bools, random floats.

Token ids, positions and masks must fit the features and each other, in ways that the graph does
not show, so a dump saves them in ``inputs.pt``.  They contain the prompt; without the file a repro
still runs the passes.  Floats (weights, pixels, features, caches) are never saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.fx import GraphModule, Node

from dartfx import compat
from dartfx.passes.graph import hint, is_state

__all__ = ["FILE", "draw", "load", "save", "sized", "unrecorded"]

FILE = "inputs.pt"
# Positions and other tables fit in here; larger integer parameters are quantised weights.
_LARGEST_STATE = 1 << 20  # bytes


def save(module: GraphModule, inputs: Sequence[Any], folder: Path) -> None:
    """Write a call's integer and bool inputs by placeholder name; nothing if there are none.

    module, inputs: as dynamo gives them to a backend.
    """
    recorded = {
        node.name: value.detach().cpu().clone()
        for node, value in zip(_placeholders(module), inputs, strict=True)
        if isinstance(value, Tensor) and _is_integral(value) and _holds_data(value)
        if not is_state(node) or value.nbytes <= _LARGEST_STATE
    }
    if recorded:
        torch.save(recorded, folder / FILE)


def load(folder: Path) -> dict[str, Tensor]:
    """What :func:`save` wrote there; empty if it wrote nothing or the file is missing."""
    file = folder / FILE
    recorded: dict[str, Tensor] = torch.load(file, weights_only=True) if file.is_file() else {}
    return recorded


def unrecorded(module: GraphModule, recorded: Mapping[str, Tensor]) -> list[str]:
    """Integer and bool inputs of the call whose values are not known."""
    return [
        node.name
        for node in _placeholders(module)
        if isinstance(value := node.meta["example_value"], Tensor) and _is_integral(value)
        if not is_state(node) and node.name not in recorded and _number(value) is None
    ]


def draw(module: GraphModule, recorded: Mapping[str, Tensor], seed: int) -> list[Any]:
    """One value per input, with the example's strides, dtype and device.

    Integer state that is not recorded is zero.  Sizes are those of the traced example.
    """
    generator = Generator().manual_seed(seed)
    return [_value(node, recorded.get(node.name), generator) for node in _placeholders(module)]


def sized(shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape at the traced example."""
    return tuple(hint(s) for s in shape)


def _placeholders(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _is_integral(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _holds_data(value: Tensor) -> bool:
    # Whoever compiles ahead of time has only fake tensors; those of DTensor are the rank's own.
    fake = isinstance(value, compat.FakeTensor) or value.is_meta
    return not fake and not compat.is_traceable_wrapper_subclass(value)


def _number(example: Tensor) -> float | None:
    """The Python number that dynamo wrapped in a tensor; None for any other tensor."""
    number = getattr(example, "item_memo", None)
    if isinstance(number, torch.SymFloat | torch.SymInt):
        value: float | None = number.node.hint
        return value
    return None


def _value(node: Node, recorded: Tensor | None, generator: Generator) -> Any:
    example = node.meta["example_value"]
    if isinstance(example, torch.SymInt):
        return hint(example)
    if not isinstance(example, Tensor):
        return example
    if (number := _number(example)) is not None:
        return torch.tensor(number, dtype=example.dtype)
    if recorded is None and _is_integral(example):
        recorded = torch.zeros(sized(example.shape), dtype=example.dtype)
    elif recorded is None:
        recorded = _floats(example, is_state(node), generator)
    return _like(recorded, example)


def _floats(like: Tensor, state: bool, generator: Generator) -> Tensor:
    """Normal values; weights scaled by their fan-in, vectors of state near 1 (norms, variances)."""
    shape = sized(like.shape)
    real = torch.float64 if like.dtype in (torch.float64, torch.complex128) else torch.float32
    dtype = like.dtype if like.is_complex() else real
    values = torch.randn(shape, generator=generator, dtype=dtype)
    if state and len(shape) > 1:
        values *= max(prod(shape[1:]), 1) ** -0.5
    elif state or not shape:
        values = 1 + 0.1 * values
    return values.to(like.dtype)


def _like(value: Tensor, example: Tensor) -> Tensor:
    """The value with the strides and on the device of the example."""
    shape, strides = sized(example.shape), sized(example.stride())
    own = tuple(1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    made = torch.empty_strided(own, strides, dtype=example.dtype, device=example.device)
    made.copy_(value[tuple(slice(n) for n in own)])
    return made.expand(shape)
