"""What a graph holds of checkpointed regions -> calls of them again, which recompute.

``frontend/inline_higher_order.py`` put their bodies into the graph for the passes.

Before::

    sin: f32[S, 8] = aten.sin(arg1_1)
    mul: f32[S, 8] = aten.mul.Tensor(sin, 2)
    relu: f32[S, 8] = aten.relu(mul)

After, with the operators in a submodule::

    checkpoint_0_0 = self.checkpoint_0_0
    tag_activation_checkpoint: (f32[S, 8]) = tag_activation_checkpoint(checkpoint_0_0, ...)
    getitem: f32[S, 8] = getitem(tag_activation_checkpoint, 0)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from dartfx.passes.frontend.inline_higher_order import CHECKPOINTS, Checkpoint, region_of
from dartfx.passes.graph import tensor


def restore_checkpoints(module: GraphModule) -> None:
    """Make each checkpointed region a call again, in place.

    What the passes inserted into a region is recomputed with it, but never a selection: a region
    around one becomes two.
    """
    checkpoints: list[Checkpoint] = module.meta.pop(CHECKPOINTS, [])
    if not checkpoints:
        return
    for number, checkpoint in enumerate(checkpoints):
        for part, nodes in enumerate(_parts(module.graph, number)):
            _enclose(module, nodes, checkpoint, f"checkpoint_{number}_{part}")
    module.graph.lint()
    module.recompile()


def _parts(graph: Graph, number: int) -> Iterator[list[Node]]:
    """Runs of nodes from a region's first to its last, without those that select tokens."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    inside = [i for i, n in enumerate(nodes) if region_of(n) == number]
    if not inside:
        return
    run: list[Node] = []
    for node in nodes[inside[0] : inside[-1] + 1]:
        if _selects(node):
            yield run
            run = []
        else:
            run.append(node)
    yield run


def _selects(node: Node) -> bool:
    """Whether the passes inserted an operator that is none of torch's own."""
    return getattr(node.target, "namespace", "aten") != "aten" and region_of(node) is None


def _enclose(module: GraphModule, nodes: list[Node], checkpoint: Checkpoint, name: str) -> None:
    inside = set(nodes)
    if not any(tensor(n) is not None for n in nodes):
        return
    # dict, not set: the order of the arguments must not change from run to run
    entering = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    leaving = [n for n in nodes if any(u not in inside for u in n.users)]
    body = Graph()
    copies = {i: body.placeholder(i.name) for i in entering}
    for old, new in copies.items():
        new.meta = {"val": old.meta.get("val")}
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(copies[n] for n in leaving))
    region = GraphModule(module, body)
    region.meta.update(checkpoint.notes)
    module.add_submodule(name, region)
    graph = module.graph
    with graph.inserting_before(nodes[0]):
        attribute = graph.get_attr(name)
        call = graph.call_function(
            checkpoint.target, (attribute, *entering), dict(checkpoint.kwargs)
        )
        call.meta["val"] = tuple(n.meta.get("val") for n in leaving)
        for index, node in enumerate(leaving):
            part = graph.call_function(operator.getitem, (call, index))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
