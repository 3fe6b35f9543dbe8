"""A dynamo graph over tensors that wrap others -> the same graph over what they wrap.

Quantised parameters (torchao) are tensor subclasses: codes and scales, with their own dispatch of
matrix products.  A trace would treat the inner tensors as constants.  Here codes and scales are the
inputs, and the graph begins by rebuilding the subclass; in the trace, rebuilding is no operator,
and linear layers become the operators that the subclass dispatches to.

Before, with a weight that wraps two tensors::

    l_weight_: f32[8, 8] = input
    matmul: f32[S, 8] = matmul(l_x_, l_weight_)

After::

    l_weight__0: f32[8, 8] = input
    l_weight__1: f32[8, 8] = input
    rebuild_subclass: f32[8, 8] = rebuild_subclass(l_weight__0, l_weight__1)
    matmul: f32[S, 8] = matmul(l_x_, rebuild_subclass)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dartfx import compat
from dartfx.passes.refusal import Refusal


@dataclass(frozen=True)
class PlainGraph:
    """The graph over plain tensors.  starts: where each of dynamo's inputs begins among its own."""

    module: GraphModule
    starts: tuple[int, ...]

    def inputs(self, given: Sequence[Any]) -> list[Any]:
        """The plain tensors in dynamo's inputs, real or fake."""
        return [plain for value in given for plain in _plain(value)]


def unwrap_subclasses(module: GraphModule) -> PlainGraph | None:
    """Rewrite a dynamo graph; the graph itself is not changed.  None where all is plain.

    Raises Refusal for subclasses whose own gradients are requested.
    """
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    wrapped = [n for n in placeholders if _is_wrapper(n.meta.get("example_value"))]
    if not wrapped:
        return None
    _require_no_own_gradients(wrapped)
    graph, copies, starts = Graph(), dict[Node, Node](), [0]
    inside: dict[Node, list[Node]] = {}
    for node in placeholders:
        parts = list(_plain(node.meta.get("example_value")))
        starts.append(starts[-1] + len(parts))
        if node in wrapped:
            inside[node] = [_part(graph, node, n, part) for n, part in enumerate(parts)]
        else:
            copies[node] = graph.node_copy(node)
            copies[node].meta = dict(node.meta)
    for node, inner in inside.items():
        copies[node] = _put_together(graph, node, inner)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = dict(node.meta)
    graph.lint()
    plain = GraphModule(module, graph)
    plain.meta = dict(module.meta)
    return PlainGraph(plain, tuple(starts[:-1]))


def _require_no_own_gradients(wrapped: Sequence[Node]) -> None:
    for node in wrapped:
        value = node.meta["example_value"]
        if torch.is_grad_enabled() and value.requires_grad:
            raise Refusal(
                f"gradients of a parameter that is not a plain tensor ({type(value).__name__})",
                node,
                advice="torch.no_grad(), or requires_grad_(False) on such parameters",
            )


def _is_wrapper(value: object) -> bool:
    return bool(compat.is_traceable_wrapper_subclass(value))


def _plain(value: Any) -> Iterator[Any]:
    """What a value wraps, down to plain tensors; itself if nothing."""
    if not _is_wrapper(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))


Layout = Callable[[Iterator[Any]], Any]


def _layout(value: Any) -> Layout:
    """Makes a value like this one of the plain tensors that it is given."""
    if not _is_wrapper(value):
        return next
    names, context = value.__tensor_flatten__()
    inside = {name: _layout(getattr(value, name)) for name in names}
    shape, stride, kind = value.shape, value.stride(), type(value)

    def rebuild(parts: Iterator[Any]) -> Any:
        inner = {name: make(parts) for name, make in inside.items()}
        return kind.__tensor_unflatten__(inner, context, shape, stride)

    return rebuild


def _rebuilt(layout: Layout, *parts: Any) -> Any:
    return layout(iter(parts))


def _put_together(graph: Graph, node: Node, inner: Sequence[Node]) -> Node:
    layout = partial(_rebuilt, _layout(node.meta["example_value"]))
    layout.__name__ = "rebuild_subclass"  # type: ignore[attr-defined]
    made = graph.call_function(layout, tuple(inner))
    made.meta = {"example_value": node.meta["example_value"]}
    return made


def _part(graph: Graph, node: Node, number: int, value: Any) -> Node:
    part = graph.placeholder(f"{node.target}_{number}")
    part.meta = {**node.meta, "example_value": value}
    return part
