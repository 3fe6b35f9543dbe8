"""A graph's parts (layers, embeddings, norm, head), their costs and the data flow between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

from dartfx.observe.html.values import Value
from dartfx.passes.graph import split_index
from dartfx.passes.site import Stack

__all__ = ["Part", "main_path", "parts", "quotient"]


@dataclass
class Part:
    """The values of one layer, or of one module that holds no layers.

    stack, layer: the run of layers it belongs to and its index there, or "" and -1.  length:
    tokens, before and after; flops, held, cached: operations, bytes of values, bytes of KV cache.
    """

    path: str
    stack: str = ""
    layer: int = -1
    names: list[str] = field(default_factory=list)
    length: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    held: tuple[int, int] = (0, 0)
    cached: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        """The path's last name; a layer with its index."""
        name = self.path.removeprefix("L['self']").strip(".") or "(outside of modules)"
        return name.rpartition(".")[2] if self.layer < 0 else f"{name.split('.')[-2]}.{self.layer}"


def parts(before: Mapping[str, Value], stacks: Iterable[Stack]) -> dict[str, Part]:
    """The graph's computed values by part, in the order in which the parts begin."""
    inside = {node.name: (s.path, index) for s in stacks for node, index in s.layer_of.items()}
    around = {prefix for s in stacks for prefix in _prefixes(s.path)}
    found: dict[str, Part] = {}
    for value in before.values():
        if value.op in ("placeholder", "output"):
            continue
        if value.name in inside:
            stack, layer = inside[value.name]
            part = Part(f"{stack}.{layer}", stack, layer)
        else:
            part = Part(_module(value, around))
        found.setdefault(part.path, part).names.append(value.name)
    return found


def _prefixes(path: str) -> Iterable[str]:
    while path:
        yield path
        path = (split_index(path) or (path.rpartition(".")[0], 0))[0]


def _module(value: Value, around: set[str]) -> str:
    """The outermost module that holds the value and no layers; else the innermost that does."""
    for path in value.modules:
        if path not in around:
            return path
    return value.modules[-1] if value.modules else ""


def quotient(before: Mapping[str, Value], found: Mapping[str, Part]) -> nx.DiGraph:
    """Which part feeds which: an edge's ``values`` counts the values that go along it."""
    part_of = {name: part.path for part in found.values() for name in part.names}
    graph = nx.DiGraph()
    graph.add_nodes_from(found)
    for name, path in part_of.items():
        for operand in before[name].operands:
            source = part_of.get(operand, path)
            if source != path:
                values = graph.get_edge_data(source, path, {"values": 0})["values"]
                graph.add_edge(source, path, values=values + 1)
    return graph


def main_path(graph: nx.DiGraph, found: Mapping[str, Part]) -> list[str]:
    """The parts along the heaviest way through the graph: vision tower, decoder layers, head.

    Parts that feed one another in a circle (code before and after the layers) count as one.
    """
    order = {path: index for index, path in enumerate(found)}
    acyclic = nx.condensation(graph)
    for _, target, edge in acyclic.edges(data=True):
        members = acyclic.nodes[target]["members"]
        edge["weight"] = 1 + sum(found[path].flops[0] for path in members)
    heaviest = nx.dag_longest_path(acyclic, weight="weight") if acyclic else []
    on_path = [path for one in heaviest for path in acyclic.nodes[one]["members"]]
    return sorted(on_path, key=order.__getitem__)


def most_common(sizes: Iterable[int]) -> int:
    """The most frequent size, the larger of equally frequent ones; 0 without any."""
    counted: Any = Counter(sizes)
    return max(counted, key=lambda size: (counted[size], size), default=0)
