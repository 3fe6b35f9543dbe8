"""Rows picked or written by index or mask."""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.frontend.canonicalise import is_sort_order
from dartfx.passes.graph import (
    argument,
    packet,
    same_size,
    sizes,
    tensor,
)
from dartfx.passes.op_sets import KEEPS_ORDER, named
from dartfx.passes.rules.table import align, rule


@rule(*named("masked_scatter", "masked_scatter_"))
def masked_scatter(axes: Axes, node: Node, out: Node) -> None:
    """Takes the source's rows by how many True came before, so the mask's dims stay opaque."""
    align(axes, node, argument(node, "self"), out)
    mask = argument(node, "mask")
    for back in range(1, len(sizes(mask)) + 1):
        axes.unify((mask, -back), (out, -back))


@rule(*named("index_put", "index_put_"))
def index_put(axes: Axes, node: Node, out: Node) -> None:
    """Written at positions that the indices name, whose dims are opaque; the shape stays.

    The dims that one 1-D index of integers leaves whole run alongside.
    """
    first, values = argument(node, "self"), argument(node, "values")
    chosen = {dim: i for dim, i in enumerate(argument(node, "indices")) if i is not None}
    (index,) = chosen.values() if len(chosen) == 1 else (None,)
    position = tensor(index)
    by_number = position is not None and position.ndim == 1 and position.dtype != torch.bool
    for dim in range(len(sizes(out))):
        if dim in chosen or not by_number:
            axes.preserve_opaque(node, (first, dim), (out, dim))
            continue
        axes.preserve(node, (first, dim), (out, dim))
        back = len(sizes(out)) - dim
        if len(sizes(values)) >= back and same_size(sizes(values)[-back], sizes(out)[dim]):
            axes.preserve(node, (values, len(sizes(values)) - back), (out, dim))


@rule(*named("embedding"))
def embedding(axes: Axes, node: Node, out: Node) -> None:
    """weight [V, D] at indices: the indices' dims, then D."""
    indices = argument(node, "indices")
    for dim in range(len(sizes(indices))):
        axes.preserve(node, (indices, dim), (out, dim))


@rule(*named("index"))
def index(axes: Axes, node: Node, out: Node) -> None:
    """Integer indices of every dim broadcast to the result; a permutation of rows permutes them.

    Anything else is opaque.
    """
    first, chosen = argument(node, "self"), argument(node, "indices")
    if any(i is None or getattr(tensor(i), "dtype", None) == torch.bool for i in chosen):
        return
    if len(chosen) == 1 and len(sizes(chosen[0])) == 1:
        _permute_rows(axes, node, first, chosen[0], out)
    if len(chosen) == len(sizes(first)):
        for indices in chosen:
            align(axes, node, indices, out)


def _permute_rows(axes: Axes, node: Node, first: Node, indices: Node, out: Node) -> None:
    """``rows[order]`` and ``rows[order // k]``, order being how ``k`` values of each row sort."""
    axes.preserve(node, (indices, 0), (out, 0))
    for dim in range(1, len(sizes(first))):
        axes.preserve(node, (first, dim), (out, dim))
    order, repeats = indices, 1
    while packet(order) in KEEPS_ORDER:
        divisor = argument(order, "other", 1)
        if type(divisor) is not int:
            return
        repeats *= divisor
        order = argument(order, "self")
    if is_sort_order(order) and same_size(sizes(first)[0] * repeats, sizes(indices)[0]):
        axes.allow_pruning(node, (first, 0))
        # Rows from before the cut would be picked by their rank among the tokens that are left.
        axes.require_recomputed(node, order, first)


@rule(*named("index_select"))
def index_select(axes: Axes, node: Node, out: Node) -> None:
    """Rows of one dim picked by 1-D indices; that dim is opaque."""
    first, indices = argument(node, "self"), argument(node, "index")
    at = argument(node, "dim") % len(sizes(first))
    for dim in range(len(sizes(first))):
        if dim != at:
            axes.preserve(node, (first, dim), (out, dim))
    axes.preserve(node, (indices, 0), (out, at))


@rule(*named("gather"))
def gather(axes: Axes, node: Node, out: Node) -> None:
    """Values of one dim picked by indices of the result's shape; that dim is opaque."""
    first, indices = argument(node, "self"), argument(node, "index")
    at = argument(node, "dim") % len(sizes(out))
    for dim in range(len(sizes(out))):
        axes.preserve(node, (indices, dim), (out, dim))
        if dim != at and same_size(sizes(first)[dim], sizes(out)[dim]):
            axes.preserve(node, (first, dim), (out, dim))


@rule(*named("scatter", "scatter_add", "scatter_reduce"))
def scatter(axes: Axes, node: Node, out: Node) -> None:
    """Values written at indices of one dim, which is opaque; the others run alongside."""
    first = argument(node, "self")
    at = argument(node, "dim") % len(sizes(out))
    for dim in range(len(sizes(out))):
        if dim == at:
            axes.preserve_opaque(node, (first, dim), (out, dim))
            continue
        axes.preserve(node, (first, dim), (out, dim))
        for operand in node.all_input_nodes[1:]:
            if same_size(sizes(operand)[dim], sizes(out)[dim]):
                axes.preserve(node, (operand, dim), (out, dim))
