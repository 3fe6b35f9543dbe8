"""A graph before and after pruning as one file for Model Explorer (ai-edge-model-explorer).

In its own format rather than as an exported program, which it reads only where dartfx's operators
are registered, and not with numbers as values; Netron reads no program with custom operators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from typing import Any

from torch.fx import GraphModule, Node

from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.passes.graph import module_paths, source_line, tensor
from dartfx.passes.site import Site
from dartfx.replay.profile import pruned_or_raise
from dartfx.replay.steps import copy

__all__ = ["explorable"]

_ADDED = {"backgroundColor": "#cdebd5", "borderColor": "#127a4b"}


def explorable(module: GraphModule, config: DartConfig, caller: CallerCapabilities) -> str:
    """The text of the file: modules are groups, and what pruning added has a colour.

    module: as dynamo made it.  Raises NotPruned.
    """
    unpruned: list[GraphModule] = []

    def observe(name: str, graph: GraphModule, site: Site | None = None, /) -> None:
        if name == "normalise":
            unpruned.append(copy(graph))

    _, pruned = pruned_or_raise(module, config, caller, observe)
    known = {node.name for node in unpruned[-1].graph.nodes}
    graphs = [_graph("before", unpruned[-1], known), _graph("after", pruned, known)]
    return json.dumps({"label": "dartfx", "graphs": graphs}) + "\n"


def _graph(name: str, module: GraphModule, known: Set[str]) -> dict[str, Any]:
    nodes = ((node.name, _node(node)) for node in module.graph.nodes)
    return {
        "id": name,
        "nodes": [n if known_as in known else n | {"style": _ADDED} for known_as, n in nodes],
    }


def _node(node: Node) -> dict[str, Any]:
    facts = {"source": source_line(node), "arguments": f"{node.args} {node.kwargs or ''}".strip()}
    made: dict[str, Any] = {
        "id": node.name,
        "label": str(node.target) if node.op == "call_function" else node.op,
        "namespace": "inputs" if node.op == "placeholder" else "/".join(_groups(node)),
        "attrs": [{"key": key, "value": value} for key, value in facts.items()],
        "incomingEdges": [
            {"sourceNodeId": operand.name, "targetNodeInputId": str(number)}
            for number, operand in enumerate(node.all_input_nodes)
        ],
    }
    if (value := tensor(node)) is not None:
        shape = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        made["outputsMetadata"] = [{"id": "0", "attrs": [{"key": "tensor_shape", "value": shape}]}]
    return made


def _groups(node: Node) -> Iterator[str]:
    """The enclosing modules, outermost first, each by what its path adds to the one around it."""
    outer = ""
    for path in module_paths(node):
        short = path.removeprefix("L['self']").lstrip(".")
        yield (short.removeprefix(f"{outer}.") if short else "model").replace("/", "|")
        outer = short
