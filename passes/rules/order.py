"""Operators that depend on positions along a dim."""

from __future__ import annotations

import operator

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import (
    argument,
    aten,
    packet,
    sizes,
)
from dartfx.passes.op_sets import COUNTS, KEEPS_ORDER, named
from dartfx.passes.rules.table import qualified_name, rule

# Along their sequence each entry depends on the entries before it, in their order: what they give
# for the kept tokens is what they give for a prompt of those tokens, closed up.  By operator, the
# name that reports show.
CAUSAL = {
    "dartfx::causal_conv1d": "conv1d",
    "dartfx::chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "dartfx::mamba2_chunk_scan": "mamba2_chunk_scan",
}
# Scans: the state that may come with a call, and the operands [B, S, ..] that they run along.
_SCANS = {
    "dartfx::chunk_gated_delta_rule": ("initial_state", ("query", "key", "value", "g", "beta")),
    "dartfx::mamba2_chunk_scan": ("initial_states", ("hidden_states", "dt", "b", "c")),
}


@rule(*named("cumsum", "cumprod", "cummax", "logcumsumexp", "flip", "roll"))
def ordered(axes: Axes, node: Node, out: Node) -> None:
    """Keeps its shape but reads positions along some dims, or moves them: those stay opaque."""
    first = argument(node, "self")
    dims = argument(node, "dim", argument(node, "dims", -1))
    if packet(node) is aten.roll and not argument(node, "dims"):
        return  # rolls the flattened tensor
    reading = {d % len(sizes(out)) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    for dim in range(len(sizes(out))):
        if dim not in reading:
            axes.preserve(node, (first, dim), (out, dim))
        elif packet(node) not in (aten.flip, aten.roll):
            axes.preserve_opaque(node, (first, dim), (out, dim))


@rule(*named("sort", "argsort"))
def sort(axes: Axes, node: Node, out: Node) -> None:
    """Opaque along its dim, unless the order only groups rows that are put back as they were."""
    first = argument(node, "self")
    at = argument(node, "dim", -1) % len(sizes(out))
    for dim in range(len(sizes(out))):
        if dim != at or _only_routes(node):
            axes.preserve(node, (first, dim), (out, dim))


def _only_routes(node: Node) -> bool:
    """Whether values and positions of a sort are only counted, or index rows, as routing does.

    Anything else could read a rank as a position: the third smallest of all is another one when
    tokens are dropped.
    """
    for user in node.users:
        kind = packet(user)
        if kind in COUNTS or user.target is aten.sym_size.int:
            continue
        if kind is aten.index and node is not argument(user, "self"):
            continue
        same_order = kind in KEEPS_ORDER or kind in (aten.argsort, operator.getitem)
        if same_order and _only_routes(user):
            continue
        return False
    return True


@rule(*named("tril", "triu"))
def triangle(axes: Axes, node: Node, out: Node) -> None:
    """Reads positions of the last two dims."""
    first = argument(node, "self")
    for dim in range(len(sizes(out))):
        if dim < len(sizes(out)) - 2:
            axes.preserve(node, (first, dim), (out, dim))
        else:
            axes.preserve_opaque(node, (first, dim), (out, dim))


@rule("dartfx::causal_conv1d")
def causal_window(axes: Axes, node: Node, out: Node) -> None:
    """A causal convolution [B, C, S]: the batch, and the sequence that it runs along."""
    first = argument(node, "input")
    for dim in (0, 2):
        axes.preserve(node, (first, dim), (out, dim))


@rule(*_SCANS)
def causal_scan(axes: Axes, node: Node, out: Node) -> None:
    """Operands [B, S, H, ..]: outputs [B, S, H, D] and the state [B, H, ..] behind the last token.

    Opaque where a state comes with the call: it also represents dropped tokens.
    """
    initial, along_tokens = _SCANS[qualified_name(node)]
    if argument(node, initial) is not None:
        return
    is_state = out.args[1] == 1
    for name in along_tokens:
        operand = argument(node, name)
        axes.preserve(node, (operand, 0), (out, 0))
        if is_state:
            axes.allow_pruning(node, (operand, 1))
        else:
            axes.preserve(node, (operand, 1), (out, 1))
