"""The region of a cut: everything that the hidden states entering layer K reach.  Read-only."""

from __future__ import annotations

from functools import cached_property

from torch.fx import Node

from dartfx import compat
from dartfx.passes.analysis.token_axes import TokenAxes, infer_axes
from dartfx.passes.graph import (
    bases,
    downstream,
    mutated_operands,
    without_gradient,
)
from dartfx.passes.op_sets import is_higher_order
from dartfx.passes.refusal import Refusal
from dartfx.passes.site import Site


class CutRegion:
    """Everything after a cut, in graph order, and where the token axis runs in it.

    Raises Refusal where an operator reads the token axis in a way that no rule accounts for.
    """

    def __init__(self, site: Site) -> None:
        graph = site.hidden.graph
        self.site = site
        self.axes = TokenAxes(infer_axes(graph), site)
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.recompute()
        _refuse_opaque(self.nodes, self.axes)
        if self.continues_cache:
            # A guard on the cache: attention has one mask for all layers.
            alike = [bool(one == other) for one, other in self.axes.axes.equal_lengths]
            if not all(alike):
                raise Refusal("the layers' caches hold different numbers of earlier tokens")

    def recompute(self) -> None:
        """Read the region off the graph again, after its outputs changed."""
        # All that the hidden states at K reach.
        starts = [u for u in self.site.hidden.users if u.op != "output"]
        if self.site.layer == 0:
            # Masks and positions are computed from the embeddings' sizes, too, and must not be cut.
            starts = [u for u in starts if u in self.site.stack.layer_of]
        reached = downstream(self.site.hidden.graph, starts)
        self.nodes = [n for n in reached if n.op != "output"]

    @cached_property
    def continues_cache(self) -> bool:
        """Whether layers behind the cut attend to tokens that a cache held before this call."""
        return any(map(self.axes.joined_dims, self.nodes))

    def anchor(self) -> Node:
        """The node that a selection is inserted before."""
        return _anchor(self.site, self.nodes[0])


def _anchor(site: Site, first: Node) -> Node:
    """Where to select: before ``first``, outside of what it turned on or off for itself."""
    off: Node | None = None
    casting: dict[object, Node] = {}
    node = site.hidden
    while node is not first:
        off = without_gradient(node, off)
        if node.target is compat.enter_autocast:
            casting[node] = node
        elif node.target is compat.exit_autocast:
            casting.pop(node.args[0], None)
        node = node.next
    order = {n: i for i, n in enumerate(first.graph.nodes)}
    return min([first, *casting.values(), *([off] if off else [])], key=order.__getitem__)


def _refuse_opaque(nodes: list[Node], axes: TokenAxes) -> None:
    # A dict: ordered, with fast membership tests.
    found = axes.opaque(dict.fromkeys(nodes))
    if found is not None:
        node, operand = found
        if any(base not in nodes for w in mutated_operands(node) for base in bases(w)):
            raise Refusal(
                "a decoder layer after the cut writes its keys and values into a cache allocated "
                "beforehand: the cache is static",
                node,
                advice="the default DynamicCache",
            )
        if is_higher_order(node):
            raise Refusal(
                f"torch.{node.target} is called with {operand}, which has the token axis, and what "
                "its subgraphs do with it is not looked into",
                node,
                advice="the same model without that call behind the cut",
            )
        raise Refusal(
            f"{node.target} reads the token axis of {operand} in a way that dropping tokens "
            "would change, or that no rule describes",
            node,
            advice="please report the operator; until it has a rule, this model runs unpruned",
        )
