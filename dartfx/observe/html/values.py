"""A graph's values in one state, as plain data that outlives the graph's rewriting."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dartfx.passes.analysis.cost import node_flops
from dartfx.passes.graph import (
    depends_on_data,
    hint,
    is_view,
    module_paths,
    mutated_operands,
    source_line,
    tensor,
)

__all__ = ["Value", "lines", "outputs", "values"]

_LINE = re.compile(r'^ +(\w+)(?:: ".*")? = (?!\w+$).*$', re.MULTILINE)
_FREED = re.compile(r";  (?:\w+ = )+None$")


@dataclass(frozen=True)
class Value:
    """One node: its line of code, operands, enclosing modules, source line and cost.

    shape: at the traced example; None for what is no tensor or has a size that depends on data.
    held: bytes that the value itself takes; 0 for views, in-place results and inputs.
    """

    name: str
    op: str
    code: str
    operands: tuple[str, ...]
    modules: tuple[str, ...]
    source: str
    shape: tuple[int, ...] | None
    floating: bool
    size: int
    held: int
    flops: int


def lines(text: str) -> dict[str, str]:
    """The line of code of each call in a rendered graph, by the name of its node."""
    found = {m[1]: _FREED.sub("", m[0].strip()) for m in _LINE.finditer(text)}
    return {name: line.replace("torch.ops.", "") for name, line in found.items()}


def values(module: GraphModule, code: Mapping[str, str]) -> dict[str, Value]:
    """Every node of a normalised graph by name, in graph order; code: its :func:`lines`."""
    return {node.name: _value(node, code.get(node.name, "")) for node in module.graph.nodes}


def outputs(module: GraphModule) -> list[Node | None]:
    """What the graph returns, by position."""
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    returned: Any = output.args[0]
    listed = returned if isinstance(returned, list | tuple) else [returned]
    return [n if isinstance(n, Node) else None for n in listed]


def _value(node: Node, code: str) -> Value:
    found = tensor(node)
    shape = None
    if found is not None and not any(map(depends_on_data, found.shape)):
        shape = tuple(hint(s) for s in found.shape)
    size = 0 if shape is None or found is None else prod(shape) * found.element_size()
    own = node.op == "call_function" and not is_view(node) and not mutated_operands(node)
    return Value(
        name=node.name,
        op=node.op,
        code=code or _head(node, found),
        operands=tuple(n.name for n in node.all_input_nodes),
        modules=tuple(module_paths(node)),
        source=source_line(node),
        shape=shape,
        floating=found is not None and found.is_floating_point(),
        size=size,
        held=size if own else 0,
        flops=node_flops(node) if shape is not None and _sized(node) else 0,
    )


def _head(node: Node, found: torch.Tensor | None) -> str:
    """The line of an input, which has none in the graph's code."""
    if found is None:
        return f"{node.name} ({node.op})"
    dtype = str(found.dtype).removeprefix("torch.")
    return f"{node.name}: {dtype}[{', '.join(map(str, found.shape))}]"


def _sized(node: Node) -> bool:
    """Whether every operand's sizes are known before the graph runs."""
    shapes = [t.shape for n in node.all_input_nodes if (t := tensor(n)) is not None]
    return not any(depends_on_data(s) for shape in shapes for s in shape)
