"""Postconditions: recompute every pruned value's shape and hold it against the token axes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import sympy
from torch.fx import Graph, Node

from dartfx.passes.analysis.axes import TokenAxes, length
from dartfx.passes.graph import Size, evaluate, expr, fake_mode, sizes, tensor
from dartfx.passes.refusal import Refusal


def expected(region: Sequence[Node], axes: TokenAxes, kept: Size) -> dict[Node, list[sympy.Expr]]:
    """The shape each value of ``region`` must have once its token axis is S' long."""
    return {
        node: [_length(node, dim, axes, kept) for dim in range(len(sizes(node)))]
        for node in region
        if tensor(node) is not None
    }


def _length(node: Node, dim: int, axes: TokenAxes, kept: Size) -> sympy.Expr:
    if axes.is_token(node, dim):
        return expr(kept)
    product = sympy.Integer(1)
    factors = axes.factors(node, dim)
    for factor in factors:
        product = product * expr(kept if axes.is_token_factor(factor) else length(factor))
    return product if factors else expr(sizes(node)[dim])


def check(graph: Graph, region: Sequence[Node], shapes: dict[Node, list[sympy.Expr]]) -> None:
    """Re-propagate fake values through the pruned region; each shape must be the expected one.

    Raises Refusal naming the node and the user's source line, so that the caller rolls back.
    """
    graph.lint()
    inside = set(region)
    mode = fake_mode(graph)
    fresh = (
        mode.shape_env.ignore_fresh_unbacked_symbols()
        if mode.shape_env is not None
        else contextlib.nullcontext()
    )
    with fresh:
        for node in graph.nodes:
            if node not in inside or "val" not in node.meta:
                continue
            try:
                node.meta["val"] = evaluate(node, mode)
            except Exception as error:  # whatever the operator says about its operands' shapes
                raise Refusal(
                    f"after pruning, {node.target} does not fit its operands: {error}", node
                ) from error
            if node in shapes:
                _compare(node, shapes[node])


def _compare(node: Node, shape: list[sympy.Expr]) -> None:
    found = [expr(s) for s in sizes(node)]
    same = len(found) == len(shape) and all(
        sympy.expand(a - b) == 0 for a, b in zip(found, shape, strict=True)
    )
    if not same:
        raise Refusal(
            f"after pruning, {node.target} gives shape {found} where {shape} was inferred", node
        )
