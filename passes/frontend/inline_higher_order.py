"""Regions that dynamo keeps as calls of subgraphs -> their operators, in the graph itself.

Gradient checkpointing, nested compile regions and the like say how a region is to be compiled or
differentiated, not what it computes.  What a checkpoint's region consists of is noted on its nodes,
so that ``transform/restore_checkpoints.py`` can make calls of what is left of it.

Before, with the operators in a submodule::

    tag_activation_checkpoint: (f32[S, 8]) = tag_activation_checkpoint(wrap_body_0, S, l_x_, ...)
    getitem: f32[S, 8] = getitem(tag_activation_checkpoint, 0)

After::

    sin: f32[S, 8] = Tensor.sin(l_x_)
    mul: f32[S, 8] = mul(sin, 2)
    relu: f32[S, 8] = Tensor.relu(mul)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from dartfx.passes.op_sets import is_higher_order

# By name, since not every torch has them all; how many arguments stand before the operands.
_WRAPS = {
    "wrap": 1,
    "wrap_activation_checkpoint": 1,
    "tag_activation_checkpoint": 1,
    "invoke_subgraph": 2,
}
_CHECKPOINTS = {"wrap_activation_checkpoint", "tag_activation_checkpoint"}
# Of a node's notes, those under "custom" are the ones that a trace copies to its nodes.
REGION = "dartfx_checkpoint"
CHECKPOINTS = "dartfx_checkpoints"


class Checkpoint(NamedTuple):
    """A checkpointed region's call: its operator, its options, and its body's notes for torch."""

    target: Any
    kwargs: dict[str, Any]
    notes: dict[str, Any]


def region_of(node: Node) -> int | None:
    """The number of the checkpointed region that a node is part of."""
    found: int | None = (node.meta.get("custom") or {}).get(REGION)
    return found


def inline_higher_order(module: GraphModule) -> GraphModule:
    """The module with every such region's body in its own graph; itself without any.

    Regions that it does not know (``cond``, ``while_loop``) stay calls.
    """
    if not any(True for _ in _calls(module)):
        return module
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for old, new in copies.items():
        new.meta = dict(old.meta)
    inlined = GraphModule(module, graph)
    inlined.meta = {**module.meta, CHECKPOINTS: []}
    while calls := list(_calls(inlined)):
        for call, body in calls:
            _inline(inlined, call, body)
    graph.eliminate_dead_code(lambda n: n.op != "get_attr")
    graph.lint()
    inlined.recompile()
    return inlined


def _calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Calls of regions that can be inlined, and the regions' bodies."""
    for node in module.graph.nodes:
        if is_higher_order(node) and node.target.name() in _WRAPS:
            body = node.args[0]
            inner = module.get_submodule(str(body.target)) if isinstance(body, Node) else None
            whole = any(user.target is not operator.getitem for user in node.users)
            if isinstance(inner, GraphModule) and not whole:
                yield node, inner


def _inline(module: GraphModule, call: Node, body: GraphModule) -> None:
    graph, name = module.graph, str(call.args[0].target)  # type: ignore[union-attr]
    kind = call.target.name()  # type: ignore[union-attr]
    region = region_of(call)
    if kind in _CHECKPOINTS and region is None:  # within another it is recomputed anyway
        region = len(module.meta[CHECKPOINTS])
        noted = Checkpoint(call.target, dict(call.kwargs), dict(body.meta))
        module.meta[CHECKPOINTS].append(noted)
    values: dict[Node, Any] = {}
    operands = call.args[_WRAPS[kind] :]
    given, renamed = iter(operands), _modules_renamed(body.graph, operands)
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                returned = map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
                values[node].meta = _notes(node, renamed, region)
                if node.op in ("get_attr", "call_module"):
                    values[node].target = f"{name}.{node.target}"
    for part in list(call.users):
        part.replace_all_uses_with(returned[part.args[1]])
        graph.erase_node(part)
    graph.erase_node(call)


Names = dict[tuple[str, ...], tuple[str, ...]]


def _modules_renamed(body: Graph, operands: Sequence[Any]) -> Names:
    """The modules that a body was traced with -> those whose parameters a call gives it instead.

    One body may serve the calls of all layers.  Dynamo names a parameter's input after its path.
    """
    renamed: Names = {}
    for placeholder, operand in zip(body.find_nodes(op="placeholder"), operands, strict=False):
        old, new = (
            tuple(str(n.target).partition("_parameters_")[0].split("_modules_"))
            for n in (placeholder, operand if isinstance(operand, Node) else placeholder)
        )
        differs = [i for i in range(1, min(len(old), len(new))) if old[i] != new[i]]
        if len(old) == len(new) and differs:
            renamed[old[1 : differs[-1] + 1]] = new[1 : differs[-1] + 1]
    return renamed


def _renamed(path: str, renamed: Names) -> str:
    root, *names = path.split(".")
    for old, new in renamed.items():
        if tuple(names[: len(old)]) == old:
            return ".".join([root, *new, *names[len(old) :]])
    return path


def _notes(node: Node, renamed: Names, region: int | None) -> dict[str, Any]:
    """The notes of a body's node, as of one call."""
    notes = dict(node.meta)
    stack = notes.get("nn_module_stack") or {}
    notes["nn_module_stack"] = {
        key: (_renamed(path, renamed), kind) for key, (path, kind) in stack.items()
    }
    if region is not None:
        notes["custom"] = {**(notes.get("custom") or {}), REGION: region}
    return notes
