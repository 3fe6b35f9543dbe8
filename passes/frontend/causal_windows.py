"""Causal convolutions along a sequence, whose two calls become one that keeps the length.

torch pads a convolution on both sides, so a causal one is S + k - 1 long until its tail is cut off,
and no dim of it is the token axis.  Before, with kernels of k = 3::

    conv1d: f32[1, 4, S + 2] = aten.conv1d(arg2_1, arg0_1, None, [1], [2], [1], 4)
    slice_1: f32[1, 4, S] = aten.slice.Tensor(conv1d, 2, 0, arg1_1)

After, as one call of which entry t depends on entries t - k + 1 ... t of the operand::

    causal_conv1d_default: f32[1, 4, S] = dartfx.causal_conv1d(arg2_1, arg0_1, None, [1], 4)

:func:`unfold_windows` writes the two calls again, by the length that the operand has then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dartfx.passes.graph import Emitter, argument, aten, is_one, packet, same_size, sizes
from dartfx.passes.op_sets import named

_library = torch.library.Library("dartfx", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "causal_conv1d(Tensor input, Tensor weight, Tensor? bias, int[1] dilation, SymInt groups) "
    "-> Tensor"
)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int], groups: int
) -> Tensor:
    padding = [dilation[0] * (weight.shape[2] - 1)]
    whole: Tensor = aten.conv1d(x, weight, bias, [1], padding, dilation, groups)
    return whole[:, :, : x.shape[2]]


_library.impl(  # type: ignore[no-untyped-call]
    "causal_conv1d", _causal_conv1d, "CompositeImplicitAutograd"
)

CAUSAL_CONV1D = torch.ops.dartfx.causal_conv1d
PADS = named("pad", "constant_pad_nd")


def fold_windows(graph: Graph) -> None:
    """Make one call of each convolution of which only the causal part is used."""
    for node in list(graph.nodes):
        if packet(node) is not aten.conv1d or not _steps_by_one(node):
            continue
        x, missing = argument(node, "input"), _window(node) - 1
        if _single(node, "padding", 0) == missing:
            _skip_whole_slices(node)
            # Unless what lies behind the last entry is read, too.
            if all(_is_head(user, x) for user in node.users):
                _fold(node, x, list(node.users))
        elif _single(node, "padding", 0) == 0 and (unpadded := _padded_in_front(x, missing)):
            _fold(node, unpadded, [node])
            if not x.users:
                graph.erase_node(x)


def _steps_by_one(node: Node) -> bool:
    kernel, step = sizes(argument(node, "weight")), _single(node, "stride", 1)
    known = type(kernel[2]) is int and type(_single(node, "dilation", 1)) is int
    return known and step == 1 and len(sizes(argument(node, "input"))) == 3


def _window(node: Node) -> int:
    """How many entries a convolution's kernel spans."""
    span = _single(node, "dilation", 1) * (sizes(argument(node, "weight"))[2] - 1)
    return int(span) + 1


def _single(node: Node, name: str, default: int) -> Any:
    value = argument(node, name, default)
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _padded_in_front(x: Node, amount: int) -> Node | None:
    """``x`` without that many zeros in front of it."""
    if packet(x) not in PADS or list(argument(x, "pad")) != [amount, 0]:
        return None
    zeros = argument(x, "mode", "constant") == "constant" and not argument(x, "value")
    return argument(x, "self") if zeros else None


def _fold(node: Node, x: Node, results: list[Node]) -> None:
    """results: the calls that give the causal part, of which there may be several."""
    emit = Emitter(node)
    rest = argument(node, "bias"), [_single(node, "dilation", 1)], argument(node, "groups", 1)
    folded = emit(CAUSAL_CONV1D.default, x, argument(node, "weight"), *rest)
    folded.meta |= {k: v for k, v in node.meta.items() if k != "val"}
    for result in results:
        result.replace_all_uses_with(folded)
        node.graph.erase_node(result)
    if node not in results:
        node.graph.erase_node(node)


def _skip_whole_slices(node: Node) -> None:
    """Read ``node`` itself where a slice keeps all of it.

    ``x[:, :, :n]`` slices the other dims, too, where torch cannot tell that nothing is cut off.
    """
    for user in list(node.users):
        if packet(user) is aten.slice and _keeps_all(user, node):
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)
            _skip_whole_slices(node)


def _keeps_all(user: Node, x: Node) -> bool:
    starts = argument(user, "start") in (None, 0) and is_one(argument(user, "step", 1))
    return starts and all(map(same_size, sizes(user), sizes(x)))


def _is_head(user: Node, x: Node) -> bool:
    """Whether a call takes the first entries of a convolution, as many as its operand has."""
    if packet(user) is not aten.slice or argument(user, "dim", 0) % 3 != 2:
        return False
    starts = argument(user, "start") in (None, 0) and is_one(argument(user, "step", 1))
    return starts and same_size(sizes(user)[2], sizes(x)[2])


def unfold_windows(graph: Graph) -> None:
    """Write the folded convolutions as calls of ATen again."""
    for node in list(graph.nodes):
        if packet(node) is not CAUSAL_CONV1D:
            continue
        emit, x = Emitter(node), argument(node, "input")
        weight, bias, dilation = (argument(node, n) for n in ("weight", "bias", "dilation"))
        padding = [_window(node) - 1]
        whole = emit(
            aten.conv1d.default, x, weight, bias, [1], padding, dilation, argument(node, "groups")
        )
        head = emit(aten.slice.Tensor, whole, 2, 0, emit.size(x, 2))
        for made in (whole, head):
            made.meta |= {k: v for k, v in node.meta.items() if k != "val"}
        node.replace_all_uses_with(head)
        node.graph.erase_node(node)
