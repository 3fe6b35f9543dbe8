"""Windows of a fixed length whose length is a symbol in dynamo's graph.

With ``dynamic=True`` Python numbers become symbols, too: the length of a sliding-window KV cache,
which keeps ``keys[:, :, -window + 1:]``.  No rule could say what such a slice takes of fewer
tokens.  The number never changes while a model runs, so that a guard on it costs nothing.  Before::

    arg0_1: Sym(W) = input
    neg: Sym(-W) = neg(arg0_1)
    add: Sym(1 - W) = add(neg, 1)
    slice_2: f32[1, H, W - 1, D] = aten.slice.Tensor(slice_1, 2, add, END)

After, with a guard that W is 6::

    arg0_1: Sym(6) = input
    slice_2: f32[1, H, 5, D] = aten.slice.Tensor(slice_1, 2, -5, END)
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from dartfx import compat
from dartfx.passes.graph import argument, depends_on_data, expr, hint, set_argument


def fix_windows(graph: Graph) -> None:
    """Make constants of the numbers that a dynamo graph's slices count back from the end.

    Installs a guard on each, so it must run while dynamo compiles the graph.  Sizes of tensors, and
    what depends on them or on data, stay symbolic.
    """
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        indices = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        for index in indices:
            start = index.start if isinstance(index, slice) else None
            value = start.meta.get("example_value") if isinstance(start, Node) else None
            if not isinstance(value, torch.SymInt) or depends_on_data(value):
                continue
            if hint(value) < 0 and not _from_sizes(value):
                int(value)  # which installs the guard


def fold_start(node: Node) -> None:
    """Replace the start of an ATen slice by a number where its symbol has only one value."""
    start = argument(node, "start")
    value = start.meta["val"] if isinstance(start, Node) else None
    if isinstance(value, torch.SymInt) and expr(value).is_Integer:
        set_argument(node, "start", int(value))


def _from_sizes(value: torch.SymInt) -> bool:
    """Whether a tensor's size has, or may have, to do with a number.

    By dynamo's sources: a graph may take a tensor's size without the tensor.
    """
    source = compat.find("TensorPropertySource")
    if source is None:
        return True  # then such a window stays symbolic, and is refused
    known = value.node.shape_env.var_to_sources
    given = [known.get(symbol) for symbol in expr(value).free_symbols]
    return any(not s or any(isinstance(one, source) for one in s) for s in given)
