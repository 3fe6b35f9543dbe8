"""How each ATen operator relates its dims: the table behind axis inference.

A rule gets ``(axes, node, out)``.  ``out`` is ``node``, or one ``getitem`` of a multi-output
call.  It ties dims that the operator keeps one to one, and *handles* dims that it sums away in a
way that does not depend on token order.  A dim that a rule leaves alone is opaque: if the token
axis reaches it after the cut, the graph is declined and the operator named.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import aten, packet, sizes, tensor
from dartfx.passes.op_sets import MULTI_OUTPUT

Rule = Callable[[Axes, Node, Node], None]
RULES: dict[object, Rule] = {}


def rule(*operators: object) -> Callable[[Rule], Rule]:
    """Register a rule for operator packets, or for qualified names of libraries' operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def relate(axes: Axes, node: Node) -> None:
    """Apply the rule of ``node``'s operator, if there is one."""
    if node.op != "call_function" or not node.all_input_nodes:
        return
    if node.target is operator.getitem:
        source = node.args[0]
        if not isinstance(source, Node) or tensor(node) is None:
            return
        if packet(source) in MULTI_OUTPUT or qualified_name(source) in MULTI_OUTPUT:
            _apply(axes, source, node)
    elif tensor(node) is not None or packet(node) is aten._assert_tensor_metadata:
        _apply(axes, node, node)


def _apply(axes: Axes, node: Node, out: Node) -> None:
    found = rule_of(node)
    if found is not None:
        found(axes, node, out)


def rule_of(node: Node) -> Rule | None:
    """The rule of a call's operator; an in-place call shares that of the functional one."""
    kind, name = packet(node), qualified_name(node)
    if kind in RULES or name in RULES:
        return RULES.get(kind) or RULES[name]
    functional = getattr(aten, name.removeprefix("aten::").rstrip("_"), None)
    if functional in RULES:
        return RULES[functional]
    calls = (node.target, getattr(functional, getattr(node.target, "_overloadname", ""), None))
    pointwise = any(torch.Tag.pointwise in getattr(call, "tags", ()) for call in calls)
    return RULES[aten.add] if pointwise else None


def qualified_name(node: Node) -> str:
    """``library::operator`` of a call; "" for what is no operator."""
    return getattr(packet(node), "_qualified_op_name", "")


def align(axes: Axes, node: Node, operand: Node, out: Node) -> None:
    """The operand's dims are those of the result, counted from the right."""
    if tensor(operand) is not None:
        for back in range(1, min(len(sizes(operand)), len(sizes(out))) + 1):
            axes.preserve(node, (operand, -back), (out, -back))


def reads_metadata_only(axes: Axes, node: Node, operand: Node) -> None:
    """Only the operand's shape, dtype or device is read, not its values."""
    for dim in range(len(sizes(operand))):
        axes.allow_pruning(node, (operand, dim))
