"""Which dims are one axis: type inference by unification.

Every dimension of every value is a variable; each operator's rule (rules/) unifies those that
must be equal.  Sizes are never compared to decide what is a token axis, so a model whose hidden
size, head count or batch equals the sequence length infers the same as any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch
from torch.fx import Node

from dartfx.passes.graph import (
    Size,
    argument,
    aten,
    bases,
    is_one,
    mutated_operands,
    packet,
    same_size,
    sizes,
    tensor,
)

Var = tuple[Node, int]
Factor = Var | int


class Axes:
    """Dimension variables of a graph, united by the operators' rules.

    Size-1 dims have separate classes, with what they broadcast against: these show which dim
    of a ``[1, S, D]`` table is the batch.
    """

    def __init__(self) -> None:
        # networkx is 285 modules, not needed before a graph is pruned.
        from networkx.utils import UnionFind

        self._same: UnionFind = UnionFind()
        self._aligned: UnionFind = UnionFind()
        self._factors: dict[Var, tuple[Factor, ...]] = {}
        self._parts: dict[Var, tuple[Var, ...]] = {}
        self.equal_lengths: list[tuple[Size, Size]] = []  # which must be equal, though it's unknown
        self._prunable: set[tuple[Node, Var]] = set()
        self._recomputed: dict[Node, tuple[Node, ...]] = {}
        self._onward: dict[Var, set[Var]] = defaultdict(set)

    def preserve(self, user: Node, a: Var, b: Var) -> None:
        """Two dims that ``user`` makes one; its operands' dims among them count as handled."""
        self.allow_pruning(user, a)
        self.allow_pruning(user, b)
        self.preserve_opaque(user, a, b)

    def preserve_opaque(self, user: Node, a: Var, b: Var) -> None:
        """Two dims that are equal position by position, though ``user`` may read positions."""
        a, b = positive(a), positive(b)
        self.unify(a, b)
        for source, result in ((a, b), (b, a)):
            # a part of a call with several results hangs on the call
            if result[0] is user or user in result[0].all_input_nodes:
                self._onward[source].add(result)

    def unify(self, a: Var, b: Var) -> None:
        """Two dims that are equal, without saying that the operator treats them token by token."""
        a, b = positive(a), positive(b)
        self._aligned.union(a, b)
        size, other_size = sizes(a[0])[a[1]], sizes(b[0])[b[1]]
        if is_one(size) or is_one(other_size):
            return
        if type(size) is int and type(other_size) is int and size != other_size:
            raise AssertionError(f"a rule tied {a[0]} dim {a[1]} to {b[0]} dim {b[1]}")
        one, other = self.factors(a), self.factors(b)
        parts, others = self.parts(a), self.parts(b)
        self._same.union(a, b)
        self._unify_parts(parts, others)
        if parts or others:
            self._parts[self._same[a]] = parts or others
        self._unify_factors(one, other)
        if one or other:
            self._factors[self._same[a]] = one or other

    def allow_pruning(self, user: Node, var: Var) -> None:
        """``user`` treats this operand dim in a way that survives dropping tokens."""
        self._prunable.add((user, positive(var)))

    def require_recomputed(self, user: Node, *operands: Node) -> None:
        """``operands`` name or count positions for ``user``, so the region must compute them."""
        self._recomputed[user] = operands

    def stale(self, nodes: Collection[Node]) -> tuple[Node, Node] | None:
        """The first (user, operand) among ``nodes`` whose positions are counted outside of them."""
        for user in nodes:
            for operand in self._recomputed.get(user, ()):
                if operand not in nodes:
                    return user, operand
        return None

    def product(self, var: Var, factors: tuple[Factor, ...]) -> None:
        """The dim is the product of these dims and numbers, in memory order (``B * S``)."""
        known, var = self.factors(var), positive(var)
        for part in (positive(f) for f in factors if isinstance(f, tuple)):
            self._onward[part].add(var)
            self._onward[var].add(part)
        self._unify_factors(known, factors)
        if not known:
            self._factors[self._same[var]] = factors

    def _unify_factors(self, one: tuple[Factor, ...], other: tuple[Factor, ...]) -> None:
        """One product split twice the same way; split another way, the parts have no relation."""
        lengths = [[factor_length(f) for f in factors] for factors in (one, other)]
        if len(one) == len(other) and all(map(same_size, *lengths)):
            for left, right in zip(one, other, strict=True):
                if isinstance(left, tuple) and isinstance(right, tuple):
                    self.unify(left, right)

    def factors(self, var: Factor) -> tuple[Factor, ...]:
        """The factors of a product dim, which are no products themselves, or ()."""
        if not isinstance(var, tuple):
            return ()
        known = self._factors.get(self._same[positive(var)], ())
        return tuple(f for factor in known for f in self.factors(factor) or (factor,))

    def join(self, user: Node, var: Var, parts: tuple[Var, ...]) -> None:
        """The dim of ``user`` is these dims one after the other (``P + S``)."""
        for part in parts:
            self.allow_pruning(user, part)
        if not self.parts(var):
            self._parts[self._same[positive(var)]] = tuple(map(positive, parts))

    def _unify_parts(self, parts: tuple[Var, ...], others: tuple[Var, ...]) -> None:
        """Two joined dims that are one axis; each layer's cache may have another length."""
        if len(parts) == len(others):
            lengths = zip(map(factor_length, parts), map(factor_length, others), strict=True)
            self.equal_lengths += [pair for pair in lengths if not same_size(*pair)]

    def parts(self, var: Var) -> tuple[Var, ...]:
        """What a joined dim consists of, in order, which is not joined itself; or ()."""
        known = self._parts.get(self._same[positive(var)], ())
        return tuple(p for part in known for p in self.parts(part) or (part,))

    def follow_write(self, node: Node) -> None:
        """An in-place call's result reaches its operand, and the bases of that view."""
        for base in (b for written in mutated_operands(node) for b in bases(written)):
            for dim in range(len(sizes(node)) if tensor(node) is not None else 0):
                for other in range(len(sizes(base)) if tensor(base) is not None else 0):
                    if self.same((node, dim), (base, other)):
                        self._onward[node, dim].add((base, other))

    def flows_to(self, start: Var, end: Var) -> bool:
        """Whether positions along one dim reach the other in their order, by some way at least."""
        seen, ahead = {start}, [start]
        while ahead and end not in seen:
            new = self._onward[ahead.pop()] - seen
            seen |= new
            ahead += new
        return end in seen

    def in_order(self, start: Node, end: Node) -> bool:
        """Whether rows and tokens of [B, S, ..] are those of an earlier [B, S, ..], in order."""
        dims = (d for d in (0, 1) if not is_one(sizes(start)[d]))
        return all(self.flows_to((start, d), (end, d)) for d in dims)

    def same(self, a: Var, b: Var) -> bool:
        """Whether two dims are one axis."""
        return bool(self._same[positive(a)] == self._same[positive(b)])

    def earliest(self, var: Var) -> Var:
        """The first dim in graph order of those that are one axis with this one."""
        axis = self._same[positive(var)]
        found: Var = min(v for v in list(self._same) if self._same[v] == axis)
        return found

    def aligned(self, a: Var, b: Var) -> bool:
        """Whether two dims are one axis or broadcast against each other."""
        return bool(self._aligned[positive(a)] == self._aligned[positive(b)])

    def is_unambiguous(self, var: Var) -> bool:
        """Whether no other axis is ever aligned with this dim.

        A ``[1, 1, 1]`` parameter used twice aligns both uses.  What was expanded from one
        to a length of its own is no other axis: every entry is the same.
        """
        aligned = next(group for group in self._aligned.to_sets() if var in group)
        return all(self.same((n, d), var) or _is_expanded(n, d) for n, d in aligned)

    def allows_pruning(self, user: Node, var: Var) -> bool:
        """Whether ``user``'s rule accounts for this operand dim."""
        return (user, var) in self._prunable


def _is_expanded(node: Node, dim: int) -> bool:
    """Whether all entries along a dim are the same, because it was expanded from size 1."""
    if is_one(sizes(node)[dim]):
        return True
    if packet(node) is aten.expand:
        source = argument(node, "self")
        missing = len(sizes(node)) - len(sizes(source))
        return dim < missing or _is_expanded(source, dim - missing)
    if packet(node) is aten.slice:
        cut = argument(node, "dim", 0) % len(sizes(node))
        return cut != dim and _is_expanded(argument(node, "self"), dim)
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    # Operands broadcast from the right.
    operands = [(i, dim - len(sizes(node)) + _rank(i)) for i in node.all_input_nodes]
    return all(d < 0 or _is_expanded(i, d) for i, d in operands)


def _rank(node: Node) -> int:
    return len(sizes(node)) if tensor(node) is not None else 0


def positive(var: Var) -> Var:
    """The same dim, counted from the left."""
    node, dim = var
    return (node, dim % len(sizes(node))) if dim < 0 else var


def factor_length(factor: Factor) -> Size:
    """The size of a product's factor."""
    return sizes(factor[0])[factor[1]] if isinstance(factor, tuple) else factor
