"""How a dynamo graph's inputs are sharded over the ranks.  Read-only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

SHARDS_KEY = "dartfx_shards"
"""Where a placeholder's ``tensor_dict`` says how the ranks' tensors make up one: a Shards."""


class Shards(NamedTuple):
    """How the ranks' tensors make up one parameter.

    group: name of the process group, "" where all its ranks hold the same; dim: that their tensors
    are laid end to end along, None where it is none; ranks: how many there are.
    """

    group: str
    dim: int | None
    ranks: int


def dtensors(graph: Graph) -> list[Any]:
    """The DTensors among a dynamo graph's inputs, as dynamo's fake values."""
    inputs = (example(n) for n in graph.nodes if n.op == "placeholder")
    return [value for value in inputs if is_dtensor(value)]


def groups(graph: Graph) -> set[str]:
    """Names of the process groups that a dynamo graph's DTensors and collectives run over."""
    found = {shards_of(value).group for value in dtensors(graph)} - {""}
    for node in graph.nodes:
        name = getattr(
            getattr(node.target, "overloadpacket", node.target), "_qualified_op_name", ""
        )
        if str(name).startswith("_c10d_functional::") and isinstance(node.args[-1], str):
            found.add(node.args[-1])
    return found


def example(node: object) -> Any:
    """Dynamo's fake value of a node."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor."""
    # By its parts: importing the class would import torch.distributed where nothing uses it.
    return isinstance(value, torch.Tensor) and hasattr(value, "_local_tensor")


def shards_of(value: Any) -> Shards:
    """How the ranks' local tensors make up a DTensor."""
    mesh = value.device_mesh
    spread = [(i, p) for i, p in enumerate(value.placements) if not p.is_replicate()]
    if not spread:
        return Shards("", None, 1)
    placements = [p for _, p in spread]
    plain = len(spread) == 1 and type(placements[0]).__name__ == "Shard"
    group = mesh.get_group(spread[0][0])
    return Shards(group.group_name, placements[0].dim if plain else None, group.size())
