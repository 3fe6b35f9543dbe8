"""Dims that are moved, split, joined, repeated or removed."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes, Factor, factor_length
from dartfx.passes.graph import (
    argument,
    aten,
    depends_on_data,
    expr,
    hint,
    is_one,
    packet,
    same_size,
    sizes,
)
from dartfx.passes.op_sets import SWAPPED_DIMS, named
from dartfx.passes.rules.table import align, reads_metadata_only, rule

_END = torch.iinfo(torch.int64).max
_LARGE = 4099


def _permuted(axes: Axes, node: Node, out: Node, order: list[int]) -> None:
    first = argument(node, "self")
    for to, source in enumerate(order):
        axes.preserve(node, (first, source), (out, to))


@rule(*named("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"))
def transpose(axes: Axes, node: Node, out: Node) -> None:
    """Two dims swapped."""
    rank = len(sizes(out))
    order = list(range(rank))
    if packet(node) is aten.numpy_T:
        order.reverse()
    elif rank > 1:
        names: tuple[str, ...] = SWAPPED_DIMS[packet(node)]
        one, other = (argument(node, name) for name in names) if names else (-2, -1)
        order[one], order[other] = order[other], order[one]
    _permuted(axes, node, out, order)


@rule(*named("permute"))
def permute(axes: Axes, node: Node, out: Node) -> None:
    """Dims in a given order."""
    _permuted(axes, node, out, [d % len(sizes(out)) for d in argument(node, "dims")])


@rule(*named("unsqueeze"))
def unsqueeze(axes: Axes, node: Node, out: Node) -> None:
    """A new size-1 dim."""
    first, at = argument(node, "self"), argument(node, "dim") % len(sizes(out))
    for dim in range(len(sizes(first))):
        axes.preserve(node, (first, dim), (out, dim if dim < at else dim + 1))


@rule(*named("squeeze"))
def squeeze(axes: Axes, node: Node, out: Node) -> None:
    """Size-1 dims are removed."""
    first = argument(node, "self")
    rank, dims = len(sizes(first)), argument(node, "dim")
    chosen = range(rank) if dims is None else (dims if isinstance(dims, list) else [dims])
    gone = {d % rank for d in chosen if is_one(sizes(first)[d])}
    remaining = [d for d in range(rank) if d not in gone]
    for to, source in enumerate(remaining):
        axes.preserve(node, (first, source), (out, to))


@rule(*named("expand", "expand_as", "broadcast_to"))
def expand(axes: Axes, node: Node, out: Node) -> None:
    """Size-1 dims repeat; new dims come in front."""
    align(axes, node, argument(node, "self"), out)
    if packet(node) is aten.expand_as:
        same_sizes(axes, node, out)


def same_sizes(axes: Axes, node: Node, out: Node) -> None:
    """The result has the shape of the second operand, whose values are not read."""
    other = argument(node, "other")
    reads_metadata_only(axes, node, other)
    for dim in range(len(sizes(out))):
        axes.unify((other, dim), (out, dim))


@rule(*named("select"))
def select(axes: Axes, node: Node, out: Node) -> None:
    """One index of a dim.  The last token stays the last; any other may not survive."""
    first = argument(node, "self")
    at = argument(node, "dim") % len(sizes(first))
    for dim in range(len(sizes(out))):
        axes.preserve(node, (first, dim if dim < at else dim + 1), (out, dim))
    if argument(node, "index") == -1:
        axes.allow_pruning(node, (first, at))


@rule(*named("slice", "narrow"))
def slice_(axes: Axes, node: Node, out: Node) -> None:
    """A range of a dim.  All of it stays the axis; the last few tokens stay the last few."""
    first = argument(node, "self")
    at = argument(node, "dim", 0) % len(sizes(first))
    for dim in range(len(sizes(out))):
        if dim != at or same_size(sizes(first)[dim], sizes(out)[dim]):
            axes.preserve(node, (first, dim), (out, dim))
    start, end = argument(node, "start"), argument(node, "end")
    if packet(node) is aten.slice and type(start) is int and start < 0 and end in (None, _END):
        axes.allow_pruning(node, (first, at))


@rule(*named("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"))
def regroup(axes: Axes, node: Node, out: Node) -> None:
    """Memory order decides: equal running products delimit groups of dims."""
    if node.target is aten.view.dtype:
        return  # the same bytes read as another type
    first = argument(node, "self")
    if packet(node) in (aten.view_as, aten.reshape_as):
        same_sizes(axes, node, out)
    for left, right in _groups(first, out):
        if len(left) == len(right) == 1:
            axes.preserve(node, (first, left[0]), (out, right[0]))
        elif len(right) == 1 and left:
            axes.product((out, right[0]), tuple((first, d) for d in left))
            for dim in left:
                axes.allow_pruning(node, (first, dim))
        elif len(left) == 1 and right:
            axes.product((first, left[0]), tuple((out, d) for d in right))
            axes.allow_pruning(node, (first, left[0]))
        elif left and right:
            _by_factors(axes, node, (first, left), (out, right))


def _by_factors(
    axes: Axes, node: Node, source: tuple[Node, list[int]], result: tuple[Node, list[int]]
) -> None:
    """``[B * S * H, D]`` as ``[B, S, H * D]``: by the dims that a product consists of."""
    (first, left), (out, right) = source, result
    parts = [part for d in left for part in axes.factors((first, d)) or ((first, d),)]
    runs: list[tuple[Factor, ...]] = []
    for dim in right:
        run: tuple[Factor, ...] = ()
        while not same_size(prod(map(factor_length, run)), sizes(out)[dim]):
            if not parts:
                return
            run = (*run, parts.pop(0))
        runs.append(run)
    if parts:
        return
    for dim, run in zip(right, runs, strict=True):
        if len(run) == 1 and isinstance(run[0], tuple):
            axes.unify(run[0], (out, dim))
        elif run:
            axes.product((out, dim), run)
    for dim in left:
        axes.allow_pruning(node, (first, dim))


def _groups(first: Node, out: Node) -> list[tuple[list[int], list[int]]]:
    """Matching runs of dims; size-1 dims pair up when both sides have as many before a run."""
    a, b = sizes(first), sizes(out)
    i = j = 0
    groups: list[tuple[list[int], list[int]]] = []
    while i < len(a) or j < len(b):
        ones_a, ones_b = [], []
        while i < len(a) and is_one(a[i]):
            ones_a.append(i)
            i += 1
        while j < len(b) and is_one(b[j]):
            ones_b.append(j)
            j += 1
        if len(ones_a) == len(ones_b):
            groups += [([x], [y]) for x, y in zip(ones_a, ones_b, strict=True)]
        if i >= len(a) and j >= len(b):
            break
        left, right, i, j = _run(a, b, i, j)
        groups.append((left, right))
    return groups


def _run(a: tuple, b: tuple, i: int, j: int) -> tuple[list[int], list[int], int, int]:  # type: ignore[type-arg]
    """The shortest runs from ``i`` and ``j`` with equal products.

    Equality is exact; the example's sizes only tell which side to lengthen.
    """
    left, right = ([i] if i < len(a) else []), ([j] if j < len(b) else [])
    i, j = i + len(left), j + len(right)
    product_a, product_b = _product(a, left), _product(b, right)
    while not bool((product_a[0] - product_b[0]).expand() == 0) and (i < len(a) or j < len(b)):
        if j >= len(b) or (i < len(a) and product_a[1] <= product_b[1]):
            left.append(i)
            i += 1
            product_a = _product(a, left)
        else:
            right.append(j)
            j += 1
            product_b = _product(b, right)
    return ([d for d in left if not is_one(a[d])] or left[:1],
            [d for d in right if not is_one(b[d])] or right[:1], i, j)  # fmt: skip


def _product(shape: tuple, dims: list[int]) -> tuple:  # type: ignore[type-arg]
    exact, example = expr(1), 1
    for dim in dims:
        exact *= expr(shape[dim])
        # A size that depends on data has no example; any will do, so a large one.
        example *= _LARGE if depends_on_data(shape[dim]) else hint(shape[dim])
    return exact, example


@rule(*named("cat", "concat"))
def cat(axes: Axes, node: Node, out: Node) -> None:
    """Joined along one dim, each part in its order; an empty part joins nothing."""
    dim = argument(node, "dim", 0) % len(sizes(out))
    full = [p for p in argument(node, "tensors") if not _is_empty(p)]
    for part in argument(node, "tensors"):
        # torch lets an empty [0] join anything
        for d in range(len(sizes(out)) if len(sizes(part)) == len(sizes(out)) else 0):
            if d != dim or full == [part]:
                axes.preserve(node, (part, d), (out, d))
    if len(full) > 1:
        axes.join(node, (out, dim), tuple((part, dim) for part in full))


def _is_empty(part: Node) -> bool:
    return any(type(s) is int and s == 0 for s in sizes(part))


@rule(*named("stack"))
def stack(axes: Axes, node: Node, out: Node) -> None:
    """Joined along a new dim."""
    at = argument(node, "dim", 0) % len(sizes(out))
    for part in node.all_input_nodes:
        for dim in range(len(sizes(part))):
            axes.preserve(node, (part, dim), (out, dim if dim < at else dim + 1))


@rule(*named("split", "split_with_sizes", "chunk", "tensor_split", "unbind"))
def split(axes: Axes, node: Node, out: Node) -> None:
    """Cut along one dim, or (``unbind``) without it."""
    first = argument(node, "self")
    at = argument(node, "dim", 0) % len(sizes(first))
    gone = len(sizes(out)) < len(sizes(first))
    for dim in range(len(sizes(first))):
        if dim != at:
            axes.preserve(node, (first, dim), (out, dim - 1 if gone and dim > at else dim))


@rule(*named("repeat"))
def repeat(axes: Axes, node: Node, out: Node) -> None:
    """A dim repeated once stays; repeated more, each copy follows the whole of the last."""
    first, times = argument(node, "self"), argument(node, "repeats")
    for back in range(1, len(sizes(first)) + 1):
        if type(times[-back]) is int and times[-back] == 1:
            axes.preserve(node, (first, -back), (out, -back))
        elif type(times[-back]) is int and not is_one(sizes(first)[-back]):
            axes.product((out, -back), (times[-back], (first, -back)))
            axes.allow_pruning(node, (first, -back))


@rule(*named("repeat_interleave"))
def repeat_interleave(axes: Axes, node: Node, out: Node) -> None:
    """The copies of a value are adjacent; other dims stay."""
    first, at, times = argument(node, "self"), argument(node, "dim"), argument(node, "repeats")
    if at is None or isinstance(times, Node):
        return
    at %= len(sizes(out))
    for dim in range(len(sizes(out))):
        if dim != at:
            axes.preserve(node, (first, dim), (out, dim))
    if not is_one(sizes(first)[at]):
        axes.product((out, at), ((first, at), times))
        axes.allow_pruning(node, (first, at))


@rule(*named("movedim", "moveaxis"))
def movedim(axes: Axes, node: Node, out: Node) -> None:
    """Some dims move to given positions, the others keep their order."""
    rank = len(sizes(out))
    source, destination = (_dims(argument(node, name), rank) for name in ("source", "destination"))
    rest = iter(d for d in range(rank) if d not in source)
    moved = dict(zip(destination, source, strict=True))
    _permuted(axes, node, out, [moved[d] if d in moved else next(rest) for d in range(rank)])


def _dims(chosen: Any, rank: int) -> list[int]:
    return [d % rank for d in (chosen if isinstance(chosen, list | tuple) else [chosen])]


@rule(*named("pad", "constant_pad_nd"))
def pad(axes: Axes, node: Node, out: Node) -> None:
    """Dims without padding stay."""
    first, amounts = argument(node, "self"), argument(node, "pad")
    for back in range(1, len(sizes(out)) + 1):
        if all(a == 0 for a in amounts[2 * back - 2 : 2 * back]):
            axes.preserve(node, (first, -back), (out, -back))
