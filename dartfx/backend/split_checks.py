"""Checks that read a tensor on the host -> out of a graph, so that the rest can be recorded.

A CUDA graph holds nothing that the host reads.  Left to dynamo, such a check breaks the frame in
two, with guards, resumed Python and copies in between.  Here the graph stays whole for the passes,
and only what is launched is split.  Before::

    eq = aten.eq.Scalar(input_ids, 32000)
    sum_1 = aten.sum.default(eq)
    eq_1 = aten.eq.Scalar(sum_1, 24)
    item = aten.item.default(eq_1)
    ge = item >= 1
    _assert_scalar = aten._assert_scalar.default(ge, "...")
    embedding = aten.embedding.default(weight, input_ids)
    ...

After, three graphs: what is read, computed on the device; the check, on the host; everything else::

    eq = aten.eq.Scalar(input_ids, 32000)       item = aten.item.default(eq_1)
    sum_1 = aten.sum.default(eq)                ge = item >= 1
    eq_1 = aten.eq.Scalar(sum_1, 24)            _assert_scalar = ...
    return (eq_1,)

    embedding = aten.embedding.default(weight, input_ids)
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import Graph, GraphModule, Node

from dartfx.passes.graph import aten, bases, mutated_operands, packet, tensor, upstream
from dartfx.passes.op_sets import PROJECTIONS
from dartfx.runtime.prefill.recorded import Recorded

__all__ = ["Checks", "Split", "lower_recorded", "split_checks"]

Compiled = Callable[..., Any]

_READS = (aten.item, aten._local_scalar_dense)


@dataclass(frozen=True)
class Split:
    """A graph without its checks.

    reads: returns the tensors that the checks read; inputs: which of the graph's inputs it takes;
    check: takes these tensors, and raises where a check fails; rest: the graph without either.
    """

    reads: GraphModule
    inputs: tuple[int, ...]
    check: GraphModule
    rest: GraphModule


class Checks:
    """The checks of a graph in two steps, between which the host need not wait for the device."""

    def __init__(self, split: Split, reads: Compiled) -> None:
        self._inputs, self._check, self._reads = split.inputs, split.check, reads

    def __call__(self, *args: Any) -> Callable[[], object]:
        """Launch what is read of the graph's inputs; the result reads it, and raises."""
        return partial(self._check, *self._reads(*[args[index] for index in self._inputs]))


def lower_recorded(
    lower: Callable[[GraphModule, Sequence[Any]], Compiled],
    module: GraphModule,
    inputs: Sequence[Any],
) -> Compiled:
    """Compile a graph whose launches are recorded, its checks apart."""
    if (split := split_checks(module)) is None:
        return Recorded(lower(module, inputs), module.graph)
    checks = Checks(split, lower(split.reads, [inputs[index] for index in split.inputs]))
    return Recorded(lower(split.rest, inputs), split.rest.graph, checks)


def split_checks(module: GraphModule) -> Split | None:
    """Split off the checks of a graph of ATen calls, which is not modified.

    None where there are none, or where what they read is not worth computing apart: used for more
    than checks, behind a product of matrices, or written to.
    """
    graph = module.graph
    reads = [node for node in graph.nodes if packet(node) in _READS]
    if not reads or (checks := _only_checked(reads)) is None:
        return None
    read = list(dict.fromkeys(node.all_input_nodes[0] for node in reads))
    before = upstream(read)
    written = {bases(w)[-1] for node in graph.nodes for w in mutated_operands(node)}
    if any(packet(node) in PROJECTIONS or bases(node)[-1] in written for node in before):
        return None
    inputs = graph.find_nodes(op="placeholder")
    # Sizes come with every graph that has symbols.
    taken = [node for node in inputs if node in before or tensor(node) is None]
    return Split(
        _part(module, taken, before, read),
        tuple(inputs.index(node) for node in taken),
        _part(module, read, checks, ()),
        _without(module, checks, before),
    )


def _only_checked(reads: Iterable[Node]) -> set[Node] | None:
    """These reads and what is computed from them; None if that is more than checks."""
    found, ahead = set[Node](), list(reads)
    while ahead:
        node = ahead.pop()
        if node.op == "output" or tensor(node) is not None:
            return None
        found.add(node)
        ahead += node.users
    # Otherwise what fails may be known to the symbols only, and Inductor checks it.
    return found if any(packet(node) is aten._assert_scalar for node in found) else None


def _part(
    module: GraphModule, inputs: Sequence[Node], nodes: Collection[Node], outputs: Sequence[Node]
) -> GraphModule:
    """Some nodes as a graph, in the order of ``module``'s."""
    part, copies = Graph(), dict[Node, Node]()
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in nodes and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return GraphModule(module, part)


def _without(module: GraphModule, nodes: Collection[Node], read: Collection[Node]) -> GraphModule:
    """``module`` without some nodes, nor those of ``read`` that only they use."""
    rest, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node not in nodes:
            copies[node] = rest.node_copy(node, copies.__getitem__)
    for node in reversed([copies[node] for node in copies if node in read]):
        if node.op != "placeholder" and not node.users:
            rest.erase_node(node)
    made = GraphModule(module, rest)
    made.meta.update(module.meta)
    return made
