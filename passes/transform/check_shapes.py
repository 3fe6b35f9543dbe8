"""Postconditions: the recomputed shape of every pruned value is what the token axes predict.

Changes fake values only.  Before::

    linear_2: f32[1, S, 8] = aten.linear(index_select_default, arg7_1)
    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, sym_size_int_3, 2, 4])
    transpose_3: f32[1, 2, S, 4] = aten.transpose.int(view_2, 1, 2)

After::

    linear_2: f32[1, S', 8] = aten.linear(index_select_default, arg7_1)
    view_2: f32[1, S', 2, 4] = aten.view(linear_2, [1, sym_size_int_3, 2, 4])
    transpose_3: f32[1, 2, S', 4] = aten.transpose.int(view_2, 1, 2)
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from dartfx.passes.analysis.axis_classes import factor_length
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.casting import noted
from dartfx.passes.graph import Size, evaluate, expr, fake_mode, sizes, tensor, value_of
from dartfx.passes.layers.equal_runs import call_key
from dartfx.passes.refusal import Refusal

Shapes = dict[Node, list[sympy.Expr]]


def check_shapes(region: CutRegion, length: int | Node) -> None:
    """Recompute the region's fake values; each shape must be the one that the axes predict.

    length: S' as an argument.  Raises Refusal naming the node and the user's source line.
    """
    # All of them before any value is recomputed: they are read off the old ones.
    shapes = _expected(region.nodes, region.axes, value_of(length))
    _recompute(region.output.graph, region.nodes, shapes)


def _expected(nodes: Sequence[Node], axes: TokenAxes, new_length: Size) -> Shapes:
    """The shape that each value must have once its token axis is S' long."""
    return {
        node: [_length(node, dim, axes, new_length) for dim in range(len(sizes(node)))]
        for node in nodes
        if tensor(node) is not None
    }


def _length(node: Node, dim: int, axes: TokenAxes, new_length: Size) -> sympy.Expr:
    if axes.is_token(node, dim):
        return expr(new_length)
    made = axes.composed(node, dim)
    if made is None:
        return expr(sizes(node)[dim])
    lengths = (new_length if axes.is_token_factor(p) else factor_length(p) for p in made.parts)
    return reduce(made.combine, map(expr, lengths))


def _recompute(graph: Graph, nodes: Sequence[Node], shapes: Shapes) -> None:
    graph.lint()
    inside = set(nodes)
    mode = fake_mode(graph)
    # What a call gives, by all that decides it: the layers' calls are alike.
    known: dict[Hashable, Any] = {}
    reshapes = any(torch.Tag.inplace_view in getattr(n.target, "tags", ()) for n in nodes)
    fresh = (
        mode.shape_env.ignore_fresh_unbacked_symbols()
        if mode.shape_env is not None
        else contextlib.nullcontext()
    )
    with fresh:
        for node in graph.nodes:
            if node not in inside or "val" not in node.meta:
                continue
            key = object() if reshapes else (call_key(node), noted(node))
            try:
                if key not in known:
                    known[key] = evaluate(node, mode)
                node.meta["val"] = known[key]
            except Exception as error:  # whatever the operator says about its operands' shapes
                raise Refusal(
                    f"after pruning, {node.target} does not fit its operands: {error}", node
                ) from error
            if node in shapes:
                _compare(node, shapes[node])


def _compare(node: Node, shape: list[sympy.Expr]) -> None:
    found = [expr(s) for s in sizes(node)]
    same = len(found) == len(shape) and all(
        a == b or sympy.expand(a - b) == 0 for a, b in zip(found, shape, strict=True)
    )
    if not same:
        raise Refusal(
            f"after pruning, {node.target} gives shape {found} where {shape} was inferred", node
        )
