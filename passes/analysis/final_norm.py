"""The decoder's final norm: which nodes normalise its last layer's output.  Read-only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from dartfx.passes.graph import downstream, module_paths, packet, same_size, sizes, tensor
from dartfx.passes.op_sets import PROJECTIONS, VALUE_BY_VALUE
from dartfx.passes.refusal import ONE_GRAPH, Refusal
from dartfx.passes.site import Stack


def final_norm(graph: Graph, stack: Stack, last: Node) -> tuple[Node, ...]:
    """Nodes of the one sibling module that normalises the last layer's output, in graph order."""
    parent = stack.path.rpartition(".")[0]
    inside: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for path in module_paths(node):
            if path.rpartition(".")[0] == parent and path != stack.path:
                inside[path].append(node)
    after = set(downstream(graph, [last]))
    found: dict[str, tuple[Node, ...]] = {}
    for path, nodes in inside.items():
        fed = [n for n in nodes if n in after]
        outputs = [n for n in fed if n.op != "output" and any(u not in nodes for u in n.users)]
        takes_last = any(last in n.all_input_nodes for n in fed)
        if not takes_last or len(outputs) != 1 or not _normalises(fed):
            continue
        if all(map(same_size, sizes(outputs[0]), sizes(last))):
            found[path] = tuple(nodes[: nodes.index(outputs[0]) + 1])
    if len(found) > 1:
        raise Refusal(f"any of {', '.join(found)} may be the norm that follows {stack.path}", last)
    for norm in found.values():
        return norm
    raise Refusal(
        f"no norm module next to {stack.path} takes its last layer's output in this graph, "
        "so the decoder is not whole here",
        last,
        advice=ONE_GRAPH,
    )


def _normalises(nodes: Sequence[Node]) -> bool:
    """Whether this work on hidden states may be a norm: no projection, nor value by value."""
    calls = [n for n in nodes if tensor(n) is not None]
    by_value = (
        torch.Tag.pointwise in getattr(n.target, "tags", ()) or packet(n) in VALUE_BY_VALUE
        for n in calls
    )
    return PROJECTIONS.isdisjoint(map(packet, calls)) and not all(by_value)
