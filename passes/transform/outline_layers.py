"""Equal layers -> calls of one subgraph, which Inductor then compiles once.

Before, two layers of one decoder, each with parameters of its own::

    linear: f32[1, S, 8] = aten.linear(arg1_1, arg2_1)
    view: f32[1, S, 2, 4] = aten.view(linear, [1, arg0_1, 2, 4])
    add: f32[1, S, 8] = aten.add.Tensor(arg1_1, reshape)
    linear_2: f32[1, S, 8] = aten.linear(add, arg6_1)
    view_2: f32[1, S, 2, 4] = aten.view(linear_2, [1, arg0_1, 2, 4])
    add_1: f32[1, S, 8] = aten.add.Tensor(add, reshape_1)

After, with a layer's operators in a submodule::

    layers_0 = self.layers_0
    invoke_subgraph: ... = invoke_subgraph(layers_0, 'layers_0', arg1_1, arg2_1, ...)
    getitem: f32[1, 2, S, 4] = getitem(invoke_subgraph, 0)
    getitem_1: f32[1, S, 8] = getitem(invoke_subgraph, 1)
    layers_1 = self.layers_0
    invoke_subgraph_1: ... = invoke_subgraph(layers_1, 'layers_0', getitem_1, arg6_1, ...)
    getitem_2: f32[1, 2, S, 4] = getitem(invoke_subgraph_1, 0)
    getitem_3: f32[1, S, 8] = getitem(invoke_subgraph_1, 1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from dartfx.passes.graph import aten, bases, is_view, mutated_operands, packet, same_size
from dartfx.passes.layers.equal_runs import Copy, EqualRun, find_equal_runs, nodes_in, value_of
from dartfx.passes.op_sets import PROJECTIONS
from dartfx.passes.refusal import Refusal

# Rows of a value by an index: with the views of it, what the passes insert in front of a layer.
_GATHERS = (aten.index_select, aten.gather)
_CALL = torch.ops.higher_order.invoke_subgraph


class Outlined:
    """What became of a graph.

    module: the graph with calls in place of equal layers; layers: for every subgraph the number of
    its calls and of the operators in it; copied: values of a layer that are copied, since they
    would share memory with what goes in or with one another.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.layers: list[tuple[int, int]] = []
        self.copied: list[Node] = []
        self._now: dict[Node, Node] = {}  # the replacement of a value that a call returns

    def replace(self, run: EqualRun, name: str) -> None:
        """Replace the copies of one run by calls of the subgraph ``name``."""
        module, graph, leaving = self.module, self.module.graph, run.leaving
        module.add_submodule(name, self._body(run, leaving))
        for number, copy in enumerate(run.copies):
            operands = [self._now.get(each[number], each[number]) for each in run.operands]
            with graph.inserting_before(copy[0]):
                region = graph.get_attr(name), name
                call = graph.call_function(_CALL, (*region, *operands))
                call.meta["val"] = tuple(value_of(copy[i]) for i in leaving)
                parts = [
                    graph.call_function(operator.getitem, (call, i)) for i in range(len(leaving))
                ]
            for part, position in zip(parts, leaving, strict=True):
                part.meta = dict(copy[position].meta)
                self._now[copy[position]] = part
                _replace_outside(copy, copy[position], part)
            for node in reversed(copy):
                graph.erase_node(node)
        self.layers.append((len(run.copies), len(run.copies[0])))

    def _body(self, run: EqualRun, leaving: Sequence[int]) -> GraphModule:
        """The subgraph.  What it returns shares no memory with what it takes, nor among itself."""
        body, first = Graph(), run.copies[0]
        copies: dict[Node, Node] = {}
        for number, (operand, *_) in enumerate(run.operands):
            new = body.placeholder(f"operand_{number}")
            new.meta["val"] = value_of(operand)
            copies[self._now.get(operand, operand)] = new
        for node in first:
            copies[node] = body.node_copy(node, copies.__getitem__)
        returned, memory = [], set[Node]()
        for node in (first[position] for position in leaving):
            base = bases(node)[-1]
            if base not in first or base in memory or not _fills(node, base):
                copies[node] = body.call_function(aten.clone.default, (copies[node],))
                copies[node].meta["val"] = value_of(node)
                self.copied.append(copies[node])
            memory.add(base)
            returned.append(copies[node])
        body.output(tuple(returned))
        return GraphModule({}, body)


def outline_layers(module: GraphModule) -> Outlined | None:
    """A copy of the graph that calls equal layers as subgraphs; None where no layers are equal.

    For graphs without gradients.  Raises Refusal where what the calls do is not what the graph did.
    """
    if not any(packet(node) in PROJECTIONS for node in module.graph.nodes):
        return None  # as in graphs that are dynamo's own
    graph, noted = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, noted))
    for old, new in noted.items():
        new.meta = dict(old.meta)
    graph.eliminate_dead_code()
    _gather_early(graph)
    runs = find_equal_runs(graph)
    if not runs:
        return None
    before = _numbered(module, graph)
    outlined = Outlined(GraphModule(module, graph))
    outlined.module.meta = dict(module.meta)
    for number, run in enumerate(runs):
        outlined.replace(run, f"layers_{number}")
    graph.lint()
    outlined.module.recompile()
    if _numbered(outlined.module, graph, outlined.copied) != before:
        raise Refusal("equal layers, put into a subgraph, would compute something else")
    return outlined


def _gather_early(graph: Graph) -> None:
    """Move what is gathered for all layers behind a cut in front of the first of them."""
    nodes = list(graph.nodes)
    written = {b for n in nodes for w in mutated_operands(n) for b in bases(w)}
    moves: set[Node] = set()
    for node in reversed(nodes):
        serves = is_view(node) and all(user in moves for user in node.users)
        size = isinstance(value_of(node), int | torch.SymInt)
        light = node.op == "call_function" and (packet(node) in _GATHERS or serves or size)
        if light and not any(b in written for read in nodes_in(node) for b in bases(read)):
            moves.add(node)
    behind: dict[int, list[Node]] = {}
    place = {n: i for i, n in enumerate(nodes)}
    inputs = max((place[n] for n in nodes if n.op == "placeholder"), default=0)
    for node in nodes:
        if node in moves or node.op == "get_attr":
            place[node] = max([inputs, *(place[i] for i in node.all_input_nodes)])
            behind.setdefault(place[node], []).append(node)
    for after, moved in behind.items():
        at = nodes[after]
        for node in moved:
            at.append(node)
            at = node


def _replace_outside(copy: Copy, node: Node, part: Node) -> None:
    inside = set(copy)
    node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)


def _fills(node: Node, base: Node) -> bool:
    """Whether a value is all of the memory that its base has."""
    value, whole = value_of(node), value_of(base)
    if not isinstance(whole, torch.Tensor):
        return False
    return same_size(value.numel(), whole.numel()) and same_size(value.storage_offset(), 0)


def _numbered(module: GraphModule, graph: Graph, omitted: Sequence[Node] = ()) -> list[Any]:
    """Every call that a graph comes to, those of its regions included, with operands by number."""
    calls: list[Any] = []

    def walk(graph: Graph, number: dict[Node, Any]) -> Any:
        for node in graph.nodes:
            if node.op == "output":
                return map_arg(node.args[0], number.__getitem__)
            if node.op in ("placeholder", "get_attr"):
                number.setdefault(node, node.target)
            elif node.target is _CALL:
                body, _, *operands = node.args
                inner: Any = module.get_submodule(str(body.target)).graph
                inputs = zip(inner.find_nodes(op="placeholder"), operands, strict=True)
                number[node] = walk(inner, {p: number[o] for p, o in inputs})
            elif node.op == "call_function" and isinstance(number.get(node.args[0]), tuple):
                number[node] = number[node.args[0]][node.args[1]]
            elif node in omitted:
                number[node] = number[node.args[0]]
            else:
                number[node] = len(calls)
                calls.append((node.target, map_arg((node.args, node.kwargs), number.__getitem__)))
        return None

    calls.append(walk(graph, {}))
    return calls
