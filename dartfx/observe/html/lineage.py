"""The origin of a value's token axis: the shortest chain of rules from the merged embeddings."""

from __future__ import annotations

import networkx as nx
from torch.fx import Graph, Node

from dartfx.passes.analysis.axis_classes import Axes, Var, positive
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.site import Site

__all__ = ["Link", "Recorded", "lineage"]

# (dim, the value it has its axis from, its dim there, the operator that ties the two or "")
Link = tuple[int, str, int, str]


class Recorded(Axes):
    """Axis inference that remembers which operator made which dims one."""

    def __init__(self) -> None:
        self.ties: list[tuple[Var, Var, str]] = []
        self._user = ""
        super().__init__()

    def preserve(self, user: Node, a: Var, b: Var) -> None:
        """As Axes does, on behalf of ``user``."""
        self._user = user.name
        super().preserve(user, a, b)
        self._user = ""

    def unify(self, a: Var, b: Var) -> None:
        """As Axes does, remembered."""
        super().unify(a, b)
        self.ties.append((positive(a), positive(b), self._user))


def lineage(graph: Graph, site: Site, axes: Recorded) -> dict[str, list[Link]]:
    """For every value with the token axis in some dim: where that dim has it from.

    The merged embeddings are where all chains end; a product dim (``B * S``) continues with its
    token factor.
    """
    token = TokenAxes(axes, site)
    ties = nx.Graph()
    for a, b, user in axes.ties:
        if token.is_token(*a) and token.is_token(*b) and a != b:
            ties.add_edge(a, b, user=user)
    root = (site.vision.embeds, 1)
    tree = nx.bfs_edges(ties, root) if root in ties else ()
    came_from = {found: parent for parent, found in tree}
    links: dict[str, list[Link]] = {root[0].name: [(root[1], "", 0, "")]}
    for (node, dim), (other, other_dim) in came_from.items():
        user = ties.edges[(node, dim), (other, other_dim)]["user"]
        links.setdefault(node.name, []).append((dim, other.name, other_dim, user))
    for node in graph.nodes:
        for dim in token.flat_dims(node):
            factor = next(f for f in token.factors(node, dim) if token.is_token_factor(f))
            assert isinstance(factor, tuple)
            links.setdefault(node.name, []).append((dim, factor[0].name, factor[1], ""))
    return links
