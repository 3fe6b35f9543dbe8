"""``vmap`` regions of dynamo's graph -> plain operators.

transformers builds sliding-window and bidirectional masks by mapping a predicate over positions.
A pre-dispatch trace records the mapping's bookkeeping but not its batching, and what it records
cannot run; traced one level lower, the batching is in the operators.  Before::

    _vmap_increment_nesting = _vmap_increment_nesting(S, 'error')
    child: i64[] = _add_batch_dim(l_positions_, 0, 1)
    _vmap_increment_nesting_1 = _vmap_increment_nesting(S, 'error')
    _add_batch_dim_1: i64[] = _add_batch_dim(l_positions_, 0, 2)
    batched_outputs: bool[] = ge(child, _add_batch_dim_1)
    batched_outputs_1: bool[S] = _remove_batch_dim(batched_outputs, 2, S, 0)
    _remove_batch_dim_1: bool[S, S] = _remove_batch_dim(batched_outputs_1, 1, S, 0)

After, a submodule with ATen in it, which the re-trace inlines::

    vmap_0 = vmap_0(S, l_positions_)
    view: i64[S, 1] = aten.view(arg1_1, [arg0_1, 1])
    ge: bool[S, S] = aten.ge.Tensor(view, arg1_1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

_ENTER, _LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


def expand_vmap(module: GraphModule, examples: Sequence[Any]) -> GraphModule:
    """The module with each vmap region as one call of a traced submodule; itself without any.

    examples: a fake value for each placeholder; call it inside their fake mode.
    """
    if not any(_name(n) == _ENTER for n in module.graph.nodes):
        return module
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    expanded = GraphModule(module, graph)
    for number, region in enumerate(_regions(graph)):
        _replace(expanded, region, f"vmap_{number}", examples)
    graph.lint()
    expanded.recompile()
    return expanded


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "")


def _regions(graph: Graph) -> list[list[Node]]:
    """The nodes from each outermost entry into a mapping to its end."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if _name(node) == _ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if _name(node) == _LEAVE:
            depth -= 1
    return regions


def _replace(module: GraphModule, region: list[Node], name: str, examples: Sequence[Any]) -> None:
    inside = set(region)
    # dict, not set: the order of the arguments must not change from run to run
    entering = list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in inside))
    leaving = [n for n in region if any(u not in inside for u in n.users)]
    body = Graph()
    copies = {i: body.placeholder(i.name) for i in entering}
    for node in region:
        copies[node] = body.node_copy(node, lambda n: copies[n])
    body.output(tuple(copies[n] for n in leaving))
    mapped = GraphModule(module, body)

    def run(*args: Any) -> Any:
        return torch.fx.Interpreter(mapped).run(*args)

    traced = make_fx(run)(*_values(module, entering, examples))
    module.add_submodule(name, traced)
    with module.graph.inserting_before(region[0]):
        call = module.graph.call_module(name, tuple(entering))
        call.meta = dict(region[0].meta)
        for index, node in enumerate(leaving):
            part = module.graph.call_function(operator.getitem, (call, index))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        module.graph.erase_node(node)


def _values(module: GraphModule, wanted: list[Node], examples: Sequence[Any]) -> list[Any]:
    """These nodes' values, computed from the placeholders' with no more work than they need."""
    needed = set(wanted)
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    interpreter = torch.fx.Interpreter(module)
    remaining = iter(examples)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            interpreter.env[node] = next(remaining)
        elif node in needed:
            interpreter.env[node] = interpreter.run_node(node)
    return [interpreter.env[node] for node in wanted]
