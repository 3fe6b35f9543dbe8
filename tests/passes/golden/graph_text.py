"""Captures dynamo's graphs, and prints and diffs them as text with one call per line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "bool",
}


def dynamo_graph(function: Callable[..., Any], *args: Tensor, symbolic: Any) -> GraphModule:
    """The one graph that dynamo makes of a call; symbolic: the dims that it takes for symbols."""
    for number, dim in symbolic:
        torch._dynamo.mark_dynamic(args[number], dim)
    graphs: list[GraphModule] = []

    def backend(module: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def render(graph: Graph) -> str:
    """``name: dtype[shape] = operator(operands)`` for every node."""
    return "\n".join(map(_line, graph.nodes)) + "\n"


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    known = _value(node.meta.get("val", node.meta.get("example_value")))
    head = f"{node.name}: {known}" if known else node.name
    if node.op == "placeholder":
        return f"{head} = input"
    if node.op == "get_attr":
        return f"{head} = self.{node.target}"
    args = [_argument(a) for a in node.args]
    given = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory")}
    args += [f"{name}={_argument(value)}" for name, value in given.items()]
    return f"{head} = {_operator(node)}({', '.join(args)})"


def _operator(node: Node) -> str:
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    name = str(node.target) if isinstance(node.target, str) else _qualified(node.target)
    return name.removesuffix(".default")


def _qualified(target: Any) -> str:
    if isinstance(target, torch._ops.OperatorBase):
        return str(target)
    return getattr(target, "__name__", str(target))


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_argument, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, slice):
        return ":".join("" if v is None else _argument(v) for v in (value.start, value.stop))
    if isinstance(value, torch.dtype):
        return _DTYPES[value]
    if value == torch.iinfo(torch.int64).max:
        return "END"
    return str(value) if isinstance(value, torch.device) else repr(value)


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES[value.dtype]}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return f"Sym({value})" if isinstance(value, torch.SymInt) else ""


def marked(before: str, after: str) -> str:
    """Both texts as one: ``-`` marks lines of the first alone, ``+`` those of the second alone."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return "\n".join(line.rstrip() for line in lines if not line.startswith("?")) + "\n"


def renamed(text: str, *names: str) -> str:
    """Symbolic sizes by these names, in the order in which they appear."""
    found = dict.fromkeys(re.findall(r"\bs\d+\b", text))
    known = dict(zip(found, names, strict=False))
    return re.sub(r"\bs\d+\b", lambda m: known.get(m[0], m[0]), text)
