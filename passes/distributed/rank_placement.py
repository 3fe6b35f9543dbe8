"""Which values of a tensor-parallel graph are the same on every rank.  Read-only.

A rank is one process of a group that runs this same graph on its own shards of the parameters.
How a parameter is sharded is known from its DTensor (:mod:`.shards`); inputs of a call are the same
on every rank, as tensor parallelism requires.  From there the operators' rules propagate shards,
and a collective makes values the same again.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from dartfx.passes.analysis.axis_classes import Axes, Factor, Var, positive
from dartfx.passes.distributed.shards import SHARDS_KEY, Shards
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
from dartfx.passes.op_sets import REGROUPS
from dartfx.passes.refusal import Refusal
from dartfx.passes.rules.table import relate

Replicate = None
"""The placement of a value that is the same on every rank."""


@dataclass(frozen=True)
class Shard:
    """Ranks hold different parts of one value, end to end along a dim."""

    dim: int


@dataclass(frozen=True)
class Unknown:
    """Ranks hold different values, in a way that is not followed any further than ``node``."""

    node: Node


RankPlacement = Shard | Unknown | None
_GATHERS = {"all_reduce", "all_gather_into_tensor", "broadcast"}


def _collective(node: Node) -> str:
    """The name of a functional collective, or ""."""
    namespace, _, name = getattr(packet(node), "_qualified_op_name", "").partition("::")
    return name.rstrip("_") if namespace == "_c10d_functional" else ""


def is_collective(node: Node) -> bool:
    """Whether a call is a functional collective, or the wait for one."""
    return bool(_collective(node))


def _shards(node: Node) -> Shards:
    known = node.meta.get("tensor_dict", {}).get(SHARDS_KEY)
    return Shards("", None, 1) if known is None else cast(Shards, known)


class RankPlacements:
    """The placement of every value of a graph.

    group: the process group that the shards and the collectives name, and ranks its size; "" and 1
    in a graph of one process.  Raises Refusal for more than one group, and where a sum over ranks
    shows that parameters are sharded in a way that they do not show.
    """

    def __init__(self, graph: Graph) -> None:
        self._of: dict[Node, RankPlacement] = {}
        self.group, self.ranks = _group(graph)
        if not self.group:
            return
        for node in graph.nodes:
            if node.op != "output":
                self.add(node)

    def of(self, node: Node) -> RankPlacement:
        """The placement of this value."""
        return self._of.get(node, Replicate)

    def add(self, node: Node) -> None:
        """Follow one call further; those before it must have been."""
        self._of[node] = found = self._placement(node)
        for written in mutated_operands(node):
            if found is not Replicate:
                # Whatever else is a view of the same memory is not followed.
                base = bases(written)[-1]
                views = [n for n in self._of if n is not node and bases(n)[-1] is base]
                self._of.update(dict.fromkeys(views, Unknown(node)))
            if _all_of(written, node):
                self._of[written] = found

    def _placement(self, node: Node) -> RankPlacement:
        if node.op == "placeholder":
            shards = _shards(node)
            if not shards.group:
                return Replicate
            return Unknown(node) if shards.dim is None else Shard(shards.dim)
        operands = {i: self._of[i] for i in node.all_input_nodes}
        if node.target is aten.sym_size.int:
            return Replicate  # shards of even length
        collective = _collective(node)
        if collective in _GATHERS:
            (value,) = operands.values()
            if value is Replicate and collective != "broadcast":
                raise Refusal(
                    "the graph combines a value over the ranks which looks the same on all of "
                    "them, so its parameters are sharded in a way that they do not show",
                    node,
                    advice="parameters that are DTensors, as transformers' tp_plan makes them",
                )
            return Replicate
        if _is_random(node):
            return Unknown(node)
        apart = {i: p for i, p in operands.items() if p is not Replicate}
        if packet(node) is aten.copy_:
            return operands[argument(node, "src")]
        if not apart:
            return Replicate
        lost = next((p for p in apart.values() if isinstance(p, Unknown)), None)
        return lost or _propagated(node, cast("dict[Node, Shard]", apart))

    @staticmethod
    def proof(node: Node) -> str:
        """Digest of how a value comes about from the graph's inputs and its last collectives.

        A number that differs from rank to rank would make values differ that were taken for the
        same; digests that are equal on all ranks rule it out.
        """
        reached: set[Node] = set()
        ahead = [node]
        while ahead:
            node = ahead.pop()
            if node not in reached and _collective(node) not in _GATHERS:
                reached.add(node)
                ahead += node.all_input_nodes
        number = {n: i for i, n in enumerate(n for n in node.graph.nodes if n in reached)}
        running = hashlib.sha256()
        for node in number:
            args = map_arg((node.args, node.kwargs), lambda n: number.get(n, -1))
            what = "input" if node.op == "placeholder" else f"{node.target} {args}"
            running.update(f"{what}\n".encode())
        return running.hexdigest()[:16]


def _all_of(written: Node, node: Node) -> bool:
    """Whether an in-place call leaves nothing of what it writes to as it was."""
    one, other = tensor(written), tensor(node)
    return one is not None and other is not None and all(map(same_size, one.shape, other.shape))


def _group(graph: Graph) -> tuple[str, int]:
    shards = [s for n in graph.nodes if n.op == "placeholder" and (s := _shards(n)).group]
    named = {s.group for s in shards}
    for node in graph.nodes:
        if is_collective(node) and isinstance(argument(node, "group_name"), str):
            named.add(argument(node, "group_name"))
    if len(named) > 1:
        raise Refusal(
            f"the graph is distributed over {len(named)} process groups at once "
            f"({', '.join(sorted(named))})",
            advice="tensor parallelism alone",
        )
    if named and not shards:
        raise Refusal(
            f"the graph exchanges values over the ranks of process group {min(named)!r}, but no "
            "parameter shows how it is sharded",
            advice="parameters that are DTensors, as transformers' tp_plan makes them",
        )
    return (min(named), shards[0].ranks) if named else ("", 1)


def _is_random(node: Node) -> bool:
    """Whether a call draws from a random generator, of which every rank has its own."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if packet(node) is aten.scaled_dot_product_attention:
        return bool(argument(node, "dropout_p", 0.0))
    return packet(node) is not aten.dropout or bool(argument(node, "train"))


class _DimPairs:
    """A substitute for :class:`Axes` that records how one operator's rule maps dims."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Var, Var]] = []

    def preserve(self, user: Node, a: Var, b: Var) -> None:
        self.unify(a, b)

    def unify(self, a: Var, b: Var) -> None:
        self.pairs.append((positive(a), positive(b)))

    def of(self, var: Var) -> list[Var]:
        """Dims that are this one."""
        return [b for one, other in self.pairs for a, b in ((one, other), (other, one)) if a == var]

    def product(self, var: Var, factors: tuple[Factor, ...]) -> None:
        # The outermost part of a dim that is laid out in parts is what a shard is a range of.
        if factors and isinstance(factors[0], tuple):
            self.unify(var, factors[0])

    def factors(self, var: Factor) -> tuple[Factor, ...]:
        """A single operator does not show the factors of a dim."""
        return ()

    def join(self, user: Node, var: Var, parts: tuple[Var, ...]) -> None:
        """A range of a part is not a range of the whole."""

    def preserve_opaque(self, user: Node, a: Var, b: Var) -> None:
        """Positions are read: a range of them is not enough to know."""

    def allow_pruning(self, user: Node, var: Var) -> None:
        """A sum over a shard is a part of the sum."""

    def require_recomputed(self, user: Node, *operands: Node) -> None:
        """Positions are counted."""


def _propagated(node: Node, operands: dict[Node, Shard]) -> RankPlacement:
    """How a call's result is split, from the dims that its rule keeps one to one."""
    if tensor(node) is None:
        # Several results: each comes by a ``getitem``, to which the call's rule applies.
        return next(iter(operands.values())) if len(operands) == 1 else Unknown(node)
    if node.target is operator.getitem:
        ((call, split),) = operands.items()
        operands = {i: split for i in call.all_input_nodes if tensor(i) is not None}
    pairs = _DimPairs()
    relate(cast(Axes, pairs), node)
    ends = [{d for n, d in pairs.of((i, s.dim)) if n is node} for i, s in operands.items()]
    (dim, *more) = ends[0] or {-1}
    if more or any(end != {dim} for end in ends):
        return Unknown(node)
    if packet(node) in REGROUPS:
        ((source, split),) = operands.items()
        dim -= _outer_one(sizes(source)[: split.dim], sizes(node)[:dim])
    return Shard(dim)


def _outer_one(before: Sequence[Size], after: Sequence[Size]) -> int:
    """1 where a view put a dim of size 1 in front of a split one, else 0.

    It is the outer part of what was one dim: the heads, of which each rank has one.
    """
    added = sum(map(is_one, after)) > sum(map(is_one, before))
    return int(added and is_one(after[-1]))
