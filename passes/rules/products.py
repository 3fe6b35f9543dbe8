"""Sums over dims: reductions, matrix products, attention."""

from __future__ import annotations

from functools import partial

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import (
    argument,
    aten,
    only_of_state,
    packet,
    sizes,
)
from dartfx.passes.op_sets import FACTORS, named
from dartfx.passes.rules.elementwise import broadcast
from dartfx.passes.rules.table import align, reads_metadata_only, rule


@rule(*named("mean", "sum", "amax", "amin", "any", "all", "var", "std", "logsumexp", "norm",
              "linalg_vector_norm", "max", "min", "topk"))  # fmt: skip
def reduce(axes: Axes, node: Node, out: Node) -> None:
    """Dims summed away do not depend on token order; which index won does, so it stays opaque."""
    first = argument(node, "self")
    rank = len(sizes(first))
    if packet(node) in (aten.max, aten.min) and len(node.all_input_nodes) == 2:
        broadcast(axes, node, out)
        return
    dims = argument(node, "dim")
    if dims is None or (dims == [] and len(sizes(out)) == 0):
        dims = [-1] if packet(node) is aten.topk else range(rank)
    reduced = {d % rank for d in (dims if isinstance(dims, list | range) else [dims])}
    keeps_dims = len(sizes(out)) == rank
    to = 0
    for dim in range(rank):
        if dim not in reduced:
            axes.preserve(node, (first, dim), (out, dim if keeps_dims else to))
            to += 1
        elif out is node:
            axes.allow_pruning(node, (first, dim))


@rule(*named("histc", "bincount"))
def count(axes: Axes, node: Node, out: Node) -> None:
    """How many values fall into each bin, whatever their order."""
    reads_metadata_only(axes, node, argument(node, "self"))


@rule(*named("cross_entropy_loss", "nll_loss", "nll_loss_nd"))
def loss(axes: Axes, node: Node, out: Node) -> None:
    """Scores [P, C] against targets [P], summed or averaged; unreduced, the rows stay."""
    scores, targets = argument(node, "self"), argument(node, "target")
    if len(sizes(scores)) == 2 and len(sizes(targets)) == 1:
        axes.preserve(node, (scores, 0), (targets, 0))
        if len(sizes(out)) == 1:
            axes.preserve(node, (scores, 0), (out, 0))


@rule(*named("linear"))
def linear(axes: Axes, node: Node, out: Node) -> None:
    """x [.., I] @ weight [O, I].T; a weight along the token axis would mix positions: opaque."""
    x, weight, bias = (argument(node, n) for n in ("input", "weight", "bias"))
    for dim in range(len(sizes(out)) - 1):
        axes.preserve(node, (x, dim), (out, dim))
    axes.unify((x, -1), (weight, -1))
    if len(sizes(weight)) == 2:
        axes.unify((weight, 0), (out, -1))
    if bias is not None and len(sizes(bias)) == 1:
        axes.unify((bias, 0), (out, -1))


@rule(*named("matmul", "bmm", "mm"))
def matmul(axes: Axes, node: Node, out: Node) -> None:
    """[.., M, C] @ [.., C, N]: the contracted dim is a sum over tokens when it is the axis."""
    a, b = (argument(node, name) for name in FACTORS[packet(node)])
    if min(len(sizes(a)), len(sizes(b))) < 2:
        return
    _contract(axes, node, (a, -1), (b, -2))
    axes.preserve(node, (a, -2), (out, -2))
    axes.preserve(node, (b, -1), (out, -1))
    for operand in (a, b):
        for back in range(3, len(sizes(operand)) + 1):
            axes.preserve(node, (operand, -back), (out, -back))


def _contract(axes: Axes, node: Node, a: tuple[Node, int], b: tuple[Node, int]) -> None:
    # A parameter as long as the sequence weighs fixed positions: not a sum over tokens.
    if only_of_state(a[0]) or only_of_state(b[0]):
        axes.unify(a, b)
    else:
        axes.preserve(node, a, b)


@rule(*named("addmm", "baddbmm"))
def addmm(axes: Axes, node: Node, out: Node) -> None:
    """bias + a [.., M, C] @ b [.., C, N]."""
    a, b = (argument(node, name) for name in FACTORS[packet(node)])
    align(axes, node, argument(node, "self"), out)
    _contract(axes, node, (a, -1), (b, -2))
    for back in range(2, len(sizes(out)) + 1):
        axes.preserve(node, (a, -back), (out, -back))
    axes.preserve(node, (b, -1), (out, -1))
    if len(sizes(b)) == 3:
        axes.preserve(node, (b, 0), (out, 0))


@rule(*named("_grouped_mm"), "transformers::grouped_mm_fallback")
def grouped_mm(axes: Axes, node: Node, out: Node) -> None:
    """Rows [P, C] in order of their group, each group times its own [C, N] of [G, C, N].

    Where groups end must be counted from the rows that remain.
    """
    rows = argument(node, "self", argument(node, "input"))
    weights = argument(node, "mat2", argument(node, "weight"))
    ends = argument(node, "offs")
    if isinstance(ends, Node) and len(sizes(rows)) == 2 and len(sizes(weights)) == 3:
        axes.preserve(node, (rows, 0), (out, 0))
        axes.unify((rows, 1), (weights, 1))
        axes.unify((weights, 2), (out, 1))
        axes.require_recomputed(node, ends)


@rule(*named("einsum"))
def einsum(axes: Axes, node: Node, out: Node) -> None:
    """Letters are the dims; an ellipsis is opaque."""
    equation = argument(node, "equation").replace(" ", "")
    if "." in equation or "->" not in equation:
        return
    left, right = equation.split("->")
    seen: dict[str, tuple[Node, int]] = {c: (out, i) for i, c in enumerate(right)}
    operands = argument(node, "tensors")
    for operand, letters in zip(operands, left.split(","), strict=True):
        for dim, letter in enumerate(letters):
            contracted = letter not in right and any(map(only_of_state, operands))
            relate = axes.unify if contracted else partial(axes.preserve, node)
            relate((operand, dim), seen.setdefault(letter, (operand, dim)))


@rule(*named("scaled_dot_product_attention"))
def attention(axes: Axes, node: Node, out: Node) -> None:
    """q [.., Q, D], k [.., K, D], v [.., K, E], mask [.., Q, K] -> [.., Q, E]."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    mask = argument(node, "attn_mask")
    axes.preserve(node, (query, -2), (out, -2))
    axes.preserve(node, (key, -2), (value, -2))
    axes.unify((query, -1), (key, -1))
    axes.unify((value, -1), (out, -1))
    for back in range(3, len(sizes(out)) + 1):
        axes.preserve(node, (query, -back), (out, -back))
        axes.preserve(node, (key, -back), (value, -back))
    if mask is not None:
        axes.preserve(node, (mask, -2), (query, -2))
        axes.preserve(node, (mask, -1), (key, -2))
        for back in range(3, len(sizes(mask)) + 1):
            axes.preserve(node, (mask, -back), (out, -back))
