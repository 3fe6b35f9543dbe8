"""Where the token axis of one cut runs, among the axes of all values.  Read-only."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from dartfx.passes.analysis.axis_classes import Axes, Factor, Var
from dartfx.passes.graph import is_one, sizes, tensor
from dartfx.passes.rules import relate
from dartfx.passes.site import Site


def infer_axes(graph: Graph, axes: Axes | None = None) -> Axes:
    """Apply the operators' rules to a graph; axes: what to fill instead of a new :class:`Axes`."""
    axes = Axes() if axes is None else axes
    for node in graph.nodes:
        relate(axes, node)
    for node in graph.nodes:
        axes.follow_write(node)
    return axes


class Composed(NamedTuple):
    """A dim made of the token axis and others: by products (``B * S``) or one after another.

    combine: of two sizes; parts: dims and numbers, in memory order.
    """

    combine: Callable[[Any, Any], Any]
    parts: tuple[Factor, ...]


class TokenAxes:
    """Where the token axis of one :class:`Site` runs."""

    def __init__(self, axes: Axes, site: Site) -> None:
        self.axes = axes
        self.token: Var = (site.hidden, 1)
        self.batch: Var = (site.hidden, 0)

    @cached_property
    def _batch_is_unambiguous(self) -> bool:
        return self.axes.is_unambiguous(self.batch)

    def is_token(self, node: Node, dim: int) -> bool:
        """Whether this dim is the token axis (of size S)."""
        return not is_one(sizes(node)[dim]) and self.axes.same((node, dim), self.token)

    def dims(self, node: object) -> tuple[int, ...]:
        """The token dims of a value; () for anything that is no tensor."""
        if not isinstance(node, Node) or tensor(node) is None:
            return ()
        return tuple(d for d in range(len(sizes(node))) if self.is_token(node, d))

    def is_token_factor(self, factor: Factor) -> bool:
        """Whether a product's factor is the token axis."""
        return isinstance(factor, tuple) and self.is_token(*factor)

    def is_batch_factor(self, factor: Factor) -> bool:
        """Whether a product's factor is the batch."""
        return isinstance(factor, tuple) and self.axes.same(factor, self.batch)

    def factors(self, node: Node, dim: int) -> tuple[Factor, ...]:
        """The factors of a product dim that has the token axis among them, else ()."""
        factors = self.axes.factors((node, dim))
        return factors if any(map(self.is_token_factor, factors)) else ()

    def flat_dims(self, node: object) -> tuple[int, ...]:
        """The product dims (``B * S``) of a value that hold the token axis."""
        if not isinstance(node, Node) or tensor(node) is None:
            return ()
        found = range(len(sizes(node)))
        return tuple(d for d in found if not self.is_token(node, d) and self.factors(node, d))

    def joined(self, node: Node, dim: int) -> tuple[Var, ...]:
        """What a dim consists of that joins the token axis to earlier tokens of a cache, or ()."""
        parts = self.axes.parts((node, dim))
        return parts if any(map(self.is_token_factor, parts)) else ()

    def joined_dims(self, node: object) -> tuple[int, ...]:
        """The dims of a value along which the token axis follows other tokens."""
        if not isinstance(node, Node) or tensor(node) is None:
            return ()
        return tuple(d for d in range(len(sizes(node))) if self.joined(node, d))

    def composed(self, node: Node, dim: int) -> Composed | None:
        """How a dim is made of the token axis and others; None for any other dim."""
        if parts := self.joined(node, dim):
            return Composed(operator.add, parts)
        factors = self.factors(node, dim)
        return Composed(operator.mul, factors) if factors else None

    def batch_dim(self, node: Node) -> int | None:
        """The dim that is, or broadcasts against, the batch; None when there is none."""
        tokens = self.dims(node)
        for dim in range(len(sizes(node))):
            if dim in tokens:
                continue
            # Only a size-1 dim is known by what it broadcasts against.
            if not is_one(sizes(node)[dim]):
                if self.axes.same((node, dim), self.batch):
                    return dim
            elif self.axes.aligned((node, dim), self.batch) and self._batch_is_unambiguous:
                return dim
        return None

    def opaque(self, nodes: Collection[Node]) -> tuple[Node, Node] | None:
        """The first (user, operand) whose token axis the user's rule does not account for."""
        for node in nodes:
            for operand in node.all_input_nodes:
                dims = (*self.dims(operand), *self.flat_dims(operand), *self.joined_dims(operand))
                if any(not self.axes.allows_pruning(node, (operand, d)) for d in dims):
                    return node, operand
        return self.axes.stale(nodes)
