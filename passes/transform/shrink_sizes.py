"""Size arguments after the cut: replaced by position, never by value.

Before, ``arg1_1`` being S::

    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, arg1_1, 2, 4])
    reshape_1: f32[1, S, 8] = aten.reshape(transpose_5, [1, arg1_1, 8])

After, ``sym_size_int_3`` being S'::

    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, sym_size_int_3, 2, 4])
    reshape_1: f32[1, S, 8] = aten.reshape(transpose_5, [1, sym_size_int_3, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Factor
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import Composed, TokenAxes
from dartfx.passes.graph import Emitter, argument, aten, packet, set_argument, sizes, tensor
from dartfx.passes.op_sets import SIZED


def shrink_sizes(region: CutRegion, length: int | Node) -> None:
    """Replace the region's token-axis sizes by the new length; length: S' as an argument."""
    reroute_sizes(region.nodes, region.axes, region.site.hidden)
    shrink(region.nodes, region.axes, length)


def shrink(region: Sequence[Node], axes: TokenAxes, new_length: int | Node) -> None:
    """Give every size argument in ``region`` whose output dim is the token axis the new length.

    new_length: S' as an argument.  Product dims (``B * S``) and those that follow the tokens of a
    cache (``P + S``) are recomputed from their parts; ``-1`` stays; a size equal to S that stands
    for something else is never touched.
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
    made = axes.composed(node, dim)
    return size if made is None else _combined(Emitter(node), made, axes, new_length)


def _combined(emit: Emitter, made: Composed, axes: TokenAxes, length: int | Node) -> int | Node:
    """The size of a dim made of the token axis, which has this length, and others."""
    lengths = [length if axes.is_token_factor(p) else _size(emit, p, axes) for p in made.parts]
    return reduce(partial(emit.arithmetic, made.combine), lengths)


def _size(emit: Emitter, factor: Factor, axes: TokenAxes) -> int | Node:
    """A factor's size, read off a value in front of its use."""
    if not isinstance(factor, tuple):
        return factor
    # A product is known by the dims that some view split it into, and that view may come later.
    return emit.size(*factor if factor[0] < emit.anchor else axes.axes.earliest(factor))


def _open_end(node: Node, axes: TokenAxes) -> None:
    """``x[:, :S]`` and ``x[:, -S:]`` of all tokens become ``x[:, :]``."""
    source = argument(node, "self")
    dim = argument(node, "dim", 0) % len(sizes(node))
    whole = axes.joined(node, dim) and axes.axes.same((source, dim), (node, dim))
    if whole or (axes.is_token(source, dim) and axes.is_token(node, dim)):
        set_argument(node, "start", 0)
        set_argument(node, "end", None)


def reroute_sizes(region: Sequence[Node], axes: TokenAxes, hidden: Node) -> None:
    """Sizes read off pruned values mean the original length: read them off ``hidden`` instead."""
    for node in region:
        for user in list(node.users):
            if user.target is not aten.sym_size.int:
                continue
            if axes.is_token(node, dim := argument(user, "dim")):
                set_argument(user, "self", hidden)
                set_argument(user, "dim", 1)
            elif (made := axes.composed(node, dim)) is not None:
                emit = Emitter(user)
                whole = _combined(emit, made, axes, emit.size(hidden, 1))
                assert isinstance(whole, Node), "as symbolic as what it stands for"
                user.replace_all_uses_with(whole)
                user.graph.erase_node(user)
