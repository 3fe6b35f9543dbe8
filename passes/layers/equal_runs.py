"""Find consecutive equal subgraphs, as decoder layers of one length are.  Read-only.

Two calls are alike when operator, constants, and the operands' and the result's dtype, shape,
strides and device are.  A run is a stretch of calls in which each is like the one a period earlier;
its copies are equal when their calls also read each other in the same pattern.  No name is looked
at.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from dartfx import compat
from dartfx.passes.graph import (
    argument,
    argument_names,
    bases,
    expr,
    is_view,
    mutated_operands,
    packet,
)
from dartfx.passes.op_sets import ASSERTIONS, PROJECTIONS, SDPA

_SMALLEST = 12  # calls in a copy: calling a region has a cost at run time
_OWN_KERNELS = PROJECTIONS | SDPA  # never fused with what is before
_PERIODS = 32  # how many of the most frequent distances are tried

Copy = tuple[Node, ...]


class EqualRun(NamedTuple):
    """copies: the calls of each, in the same order; operands: for every value that they read from
    outside of themselves, the one that each copy reads."""

    copies: tuple[Copy, ...]
    operands: tuple[tuple[Node, ...], ...]

    @property
    def leaving(self) -> list[int]:
        """Positions of the values that any copy's outside reads."""
        return sorted(set().union(*map(_leaving, self.copies)))


def find_equal_runs(graph: Graph) -> list[EqualRun]:
    """Runs that do not overlap, in graph order, those that save most calls first to be taken."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    keys = [call_key(n) for n in nodes]
    taken = [False] * len(nodes)
    found: list[tuple[int, EqualRun]] = []
    for start, period, matches in _stretches(keys):
        if any(taken[start : start + period + matches]):
            continue
        run = _run(nodes, start, period, matches)
        if run is not None:
            first = nodes.index(run.copies[0][0])
            taken[first : first + period * len(run.copies)] = [True] * period * len(run.copies)
            found.append((first, run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def value_of(node: Node) -> Any:
    """A node's fake value, of the passes' graphs and of dynamo's."""
    return node.meta.get("val", node.meta.get("example_value"))


def nodes_in(node: Node) -> list[Node]:
    """Every node among a call's arguments, with repetitions."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def call_key(node: Node) -> Hashable:
    """Equal for calls that are alike, with all values as they are noted; unique for a call that no
    region may hold."""
    target: Any = node.target
    if hasattr(target, "overloadpacket"):
        checks = packet(node) in ASSERTIONS or target.namespace.startswith("_c10d")
        if checks or _is_random(node):
            return object()
    elif target is not operator.getitem and not isinstance(value_of(node), _SIZES):
        return object()
    return target, _plain((node.args, node.kwargs)), _described(value_of(node))


_SIZES = (int, torch.SymInt)


def _is_random(node: Node) -> bool:
    """Whether a call may draw random numbers, as attention with dropout does."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:  # type: ignore[union-attr]
        return False
    never = 0.0 if "dropout_p" in argument_names(node.target) else None
    off = argument(node, "train") is False or argument(node, "dropout_p", never) == 0
    return not off


def _plain(arg: Any) -> Hashable:
    if isinstance(arg, Node):
        return _described(value_of(arg))
    if isinstance(arg, list | tuple):
        return tuple(map(_plain, arg))
    if isinstance(arg, dict):
        return tuple((k, _plain(v)) for k, v in arg.items())
    if isinstance(arg, slice):
        return "slice", _plain((arg.start, arg.stop, arg.step))
    return type(arg), arg  # 1, 1.0 and True are equal


def _described(value: Any) -> Hashable:
    """What the compiled code may depend on of a value."""
    if isinstance(value, torch.Tensor):
        known = type(value) in (compat.FakeTensor, torch.Tensor, torch.nn.Parameter)
        if not known or value.layout is not torch.strided:
            return object()
        sizes = tuple(map(expr, value.shape)), tuple(map(expr, value.stride()))
        lazily = value.is_conj(), value.is_neg()
        return sizes, expr(value.storage_offset()), value.dtype, value.device, lazily
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return ("size", expr(value)) if isinstance(value, _SIZES) else object()


def _stretches(keys: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """(start, period, matches) of stretches of two copies or more, the longest first."""
    last: dict[Hashable, int] = {}
    distances = Counter[int]()
    for i, key in enumerate(keys):
        if key in last:
            distances[i - last[key]] += 1
        last[key] = i
    likely = [d for d, _ in distances.most_common() if d >= _SMALLEST][:_PERIODS]
    found = [(start, p, matches) for p in likely for start, matches in _matches(keys, p)]
    return sorted(found, key=lambda f: (-(f[2] // f[1]) * f[1], f[1], f[0]))


def _matches(keys: Sequence[Hashable], period: int) -> Iterator[tuple[int, int]]:
    """Start and number of consecutive calls that are like the ones a period later."""
    count = 0
    for i in range(len(keys) - period + 1):
        if i < len(keys) - period and keys[i] == keys[i + period]:
            count += 1
            continue
        if count >= period:
            yield i - count, count
        count = 0


def _run(nodes: Sequence[Node], start: int, period: int, matches: int) -> EqualRun | None:
    """The copies of a stretch, cut where that splits the fewest kernels and values leave them."""
    count = matches // period + 1

    def copies(first: int) -> list[Copy]:
        return [tuple(nodes[first + i * period :][:period]) for i in range(count)]

    offsets = range(start, start + matches % period + 1)
    best = min(offsets, key=lambda first: _cost(*copies(first)[:2]))
    chosen = copies(best)
    # Those that read in the same pattern; the first may read what others find in the one before.
    begin = longest = last = 0
    for end in range(1, count + 1):
        if end - begin > longest:
            longest, last = end - begin, end
        if end < count and _operands(chosen[end - 1 : end + 1]) is None:
            begin = end
    chosen = chosen[last - longest : last]
    operands = _operands(chosen) if len(chosen) > 1 else None
    run = None if operands is None else EqualRun(tuple(chosen), operands)
    return run if run is not None and _may_be_region(run) else None


def _cost(before: Copy, copy: Copy) -> tuple[int, int]:
    """What it costs to begin a copy here: calls that Inductor would fuse with the end of the one
    before, such as a norm with the sum it is of, and values that leave a copy."""
    early, late, fused = set(before), set[Node](), 0
    for node in copy:
        reads = nodes_in(node)
        if packet(node) in _OWN_KERNELS or any(r in late for r in reads):
            late.add(node)
        elif any(r in early for r in reads):
            early.add(node)
            fused += not is_view(node)
    return fused, len(_leaving(before))


def _leaving(copy: Copy) -> list[int]:
    inside = set(copy)
    return [i for i, n in enumerate(copy) if any(u not in inside for u in n.users)]


def _operands(copies: Sequence[Copy]) -> tuple[tuple[Node, ...], ...] | None:
    """What each copy reads from outside; None where one reads differently from the others."""
    index = [{node: i for i, node in enumerate(copy)} for copy in copies]
    outside: dict[tuple[Node, ...], None] = {}
    for calls in zip(*copies, strict=True):
        for operands in zip(*map(nodes_in, calls), strict=True):
            places = {inside.get(o) for inside, o in zip(index, operands, strict=True)}
            if len(places) > 1:
                return None
            if places == {None}:
                outside[operands] = None
    return tuple(outside)


def _may_be_region(run: EqualRun) -> bool:
    """Whether a call of a subgraph can replace each copy, and is worth it."""
    inside = set(run.copies[0])
    first = run.copies[0]
    works = any(packet(n) in PROJECTIONS for n in first)
    writes = [b for n in first for w in mutated_operands(n) for b in bases(w)]
    tensors = all(isinstance(value_of(first[i]), torch.Tensor) for i in run.leaving)
    # Inductor takes a call of a subgraph for one on a single device.
    devices = {d for n in (*first, *(o for o, *_ in run.operands)) for d in _devices(value_of(n))}
    return works and tensors and len(devices) == 1 and all(b in inside for b in writes)


def _devices(value: Any) -> set[torch.device]:
    parts = value if isinstance(value, list | tuple) else [value]
    return {part.device for part in parts if isinstance(part, torch.Tensor)}
