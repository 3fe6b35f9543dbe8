"""Size arguments after the cut: replaced by position, never by value.

Before, ``arg1_1`` being S::

    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, arg1_1, 2, 4])
    reshape_1: f32[1, S, 8] = aten.reshape(transpose_5, [1, arg1_1, 8])

After, ``sym_size_int_3`` being S'::

    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, sym_size_int_3, 2, 4])
    reshape_1: f32[1, S, 8] = aten.reshape(transpose_5, [1, sym_size_int_3, 8])
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Factor
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.graph import Emitter, argument, aten, packet, set_argument, sizes, tensor
from dartfx.passes.op_sets import SIZED


def shrink_sizes(region: CutRegion, length: int | Node) -> None:
    """Let the region's sizes mean the new length; length: S' as an argument."""
    reroute_sizes(region.nodes, region.axes, region.site.hidden)
    shrink(region.nodes, region.axes, length)


def shrink(region: Sequence[Node], axes: TokenAxes, new_length: int | Node) -> None:
    """Give every size argument in ``region`` whose output dim is the token axis the new length.

    new_length: S' as an argument.  Product dims (``B * S``) are recomputed from their factors;
    ``-1`` stays; a size equal to S that stands for something else is never touched.
    """
    for node in region:
        name: str | None = SIZED.get(packet(node))
        if name is not None and tensor(node) is not None:
            old = argument(node, name)
            new = [_argument(node, d, size, axes, new_length) for d, size in enumerate(old)]
            if new != list(old):
                set_argument(node, name, new)
        elif packet(node) is aten.unflatten:
            _unflatten(node, axes, new_length)
        elif packet(node) is aten.slice:
            _open_end(node, axes)


def _unflatten(node: Node, axes: TokenAxes, new_length: int | Node) -> None:
    first = argument(node, "dim") % len(sizes(argument(node, "self")))
    old = argument(node, "sizes")
    new = [_argument(node, first + d, size, axes, new_length) for d, size in enumerate(old)]
    set_argument(node, "sizes", new)


def _argument(
    node: Node, dim: int, size: int | Node, axes: TokenAxes, new_length: int | Node
) -> int | Node:
    if type(size) is int and size == -1:
        return size
    if axes.is_token(node, dim):
        return new_length
    factors = axes.factors(node, dim)
    if not factors:
        return size
    emit = Emitter(node)
    product: int | Node = 1
    for factor in factors:
        part = new_length if axes.is_token_factor(factor) else _size(emit, factor, axes)
        product = emit.arithmetic(operator.mul, product, part)
    return product


def _size(emit: Emitter, factor: Factor, axes: TokenAxes) -> int | Node:
    """A factor's size, read off a value that stands above where it is used."""
    if not isinstance(factor, tuple):
        return factor
    # A product is known by the dims that some view split it into, and that view may come later.
    return emit.size(*factor if factor[0] < emit.anchor else axes.axes.earliest(factor))


def _open_end(node: Node, axes: TokenAxes) -> None:
    """``x[:, :S]`` and ``x[:, -S:]`` of all tokens become ``x[:, :]``."""
    source = argument(node, "self")
    dim = argument(node, "dim", 0) % len(sizes(node))
    if axes.is_token(source, dim) and axes.is_token(node, dim):
        set_argument(node, "start", 0)
        set_argument(node, "end", None)


def reroute_sizes(region: Sequence[Node], axes: TokenAxes, hidden: Node) -> None:
    """Sizes read off pruned values mean the original length: read them off ``hidden`` instead."""
    for node in region:
        for user in list(node.users):
            if user.target is aten.sym_size.int and axes.is_token(node, argument(user, "dim")):
                set_argument(user, "self", hidden)
                set_argument(user, "dim", 1)
