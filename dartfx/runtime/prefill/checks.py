"""Checks whether compiled code can be recorded and whether a replay is correct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

__all__ = ["Unrecordable", "alike", "on_host", "require_here"]


class Unrecordable(Exception):
    """Code that cannot be replayed: a recording cannot hold what it reads or returns."""


def on_host(graph: Graph) -> str:
    """Describe work on the host in a graph for an accelerator; "" if none is visible."""
    devices: dict[str, str] = {}
    for node in graph.nodes:
        if torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()):
            return f"{node.target} reads on the host"
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, Tensor) and value.ndim:  # scalars are launch constants
            devices.setdefault(value.device.type, node.name)
    return f"{devices['cpu']} is on the host" if "cpu" in devices and len(devices) > 1 else ""


def require_here(tensors: Iterable[Tensor], here: torch.device) -> None:
    """Raise Unrecordable for tensors on other devices and tensors that are not plain."""
    for value in tensors:
        if type(value) not in (Tensor, nn.Parameter):
            raise Unrecordable(f"it takes a {type(value).__name__}")
        if value.device != here:
            raise Unrecordable(f"it takes a tensor on {value.device}, called on {here}")


def alike(replayed: Sequence[Any], plain: Sequence[Any]) -> bool:
    """Whether outputs are equal up to rounding from a different summation order."""
    pairs = list(zip(replayed, plain, strict=True))
    tensors = [(one, other) for one, other in pairs if isinstance(other, Tensor)]
    rest = [(one, other) for one, other in pairs if not isinstance(other, Tensor)]
    return all(one == other for one, other in rest) and all(_close(*pair) for pair in tensors)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    share = 1e-3 if other.dtype == torch.float32 else 0.05
    return not other.numel() or bool((one - other).abs().max() <= share * other.abs().max())
