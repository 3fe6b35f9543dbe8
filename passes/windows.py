"""Windows of a fixed length whose length dynamo made a symbol of.

With ``dynamic=True`` dynamo makes symbols of Python numbers, too: of the length of a sliding-window
KV cache, which keeps ``keys[:, :, -window + 1:]``.  No rule could tell what such a slice leaves of
fewer tokens.  The number never changes while a model runs, so that a guard on it costs nothing.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch.fx import Graph, Node

from .graph import argument, expr, set_argument


def fix_windows(graph: Graph) -> None:
    """Make constants of the numbers that a dynamo graph's slices count back from the end.

    Installs a guard on each, so it must run while dynamo compiles the graph.  Sizes of tensors, and
    what depends on them or on data, stay symbolic.
    """
    lengths = _sizes_of_inputs(graph)
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        indices = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        for index in indices:
            start = index.start if isinstance(index, slice) else None
            value = start.meta.get("example_value") if isinstance(start, Node) else None
            if not isinstance(value, torch.SymInt) or value.node.hint is None:
                continue
            if value.node.hint < 0 and lengths.isdisjoint(expr(value).free_symbols):
                int(value)


def write_out(node: Node) -> None:
    """Where an ATen slice starts, as a number, if only one is possible."""
    start = argument(node, "start")
    value = start.meta["val"] if isinstance(start, Node) else None
    if isinstance(value, torch.SymInt) and expr(value).is_Integer:
        set_argument(node, "start", int(value))


def _sizes_of_inputs(graph: Graph) -> set[sympy.Symbol]:
    values = (n.meta.get("example_value") for n in graph.find_nodes(op="placeholder"))
    sizes = (size for v in values if isinstance(v, torch.Tensor) for size in v.shape)
    return {symbol for size in sizes for symbol in expr(size).free_symbols}
