"""Splits a pruned graph so that everything before the selection is computed once per input.

Measuring selectors and numbers of tokens at one layer runs the same graph on the same prompts
repeatedly.  The part before the selection depends on neither, and is most of the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from dartfx.backend import lowering
from dartfx.config.options import DartConfig
from dartfx.passes.graph import argument, bases, mutated_operands, set_argument

__all__ = ["Resumed", "resuming"]


@contextmanager
def resuming(made: list[Resumed], retain: int) -> Iterator[None]:
    """Split pruned graphs that are lowered to eager in this context, and keep R tokens.

    made: the list that new ones are appended to.
    """

    def lower(config: DartConfig, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if config.lowering != "eager" or not _selections(module.graph):
            return lowering.lower(config, module, inputs)
        halves = Resumed(module)
        halves.retain(retain)
        made.append(halves)
        return halves

    for halves in made:
        halves.retain(retain)
    with lowering.lowering_with(lower):
        yield


class Resumed:
    """A graph module that caches what it computed before the selection.

    The first half's in-place writes to inputs (such as states in a cache) are repeated on each
    call's inputs.  Values that the second half writes to are computed there.  Raises ValueError if
    the first half reads these, or passes on a view of a mutated input.
    """

    def __init__(self, module: GraphModule) -> None:
        graph = module.graph
        after = set(_selections(graph))
        for node in graph.nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
                behind = (base for w in mutated_operands(node) for base in bases(w))
                after.update(base for base in behind if base.op != "placeholder")
        before = [n for n in graph.nodes if n not in after and n.op != "output"]
        for node in before:
            if not after.isdisjoint(node.all_input_nodes):
                raise ValueError(f"{node} reads a value that is written to behind the selection")
        inputs = [n for n in before if n.op == "placeholder"]
        written = {bases(w)[-1] for n in graph.nodes for w in mutated_operands(n)}
        needed = [n for n in before if any(u in after or u.op == "output" for u in n.users)]
        computed = [n for n in needed if n.op != "placeholder"]
        for node in computed:
            if bases(node)[-1] in written.intersection(inputs):
                raise ValueError(f"{node} is a view of an input that is written to")
        first = {bases(w)[-1] for n in before for w in mutated_operands(n)}
        returned = {base for n in graph.output_node().all_input_nodes for base in bases(n)}
        self._returned = [n in returned for n in computed]
        self._given = [number for number, n in enumerate(inputs) if n in needed]
        self._written = [number for number, n in enumerate(inputs) if n in first]
        self._first = _part(module, before, [], computed)
        rest = [n for n in graph.nodes if n in after and n.op != "output"]
        given = [inputs[number] for number in self._given]
        self._rest = _part(module, rest, [*given, *computed], graph.output_node().args[0])
        self.known: dict[bytes, tuple[Any, list[Any]]] = {}

    def retain(self, tokens: int) -> None:
        """Set the number of vision tokens to keep, fewer than there are.

        The rewritten graph derives all sizes behind the cut from the selection's result, so R
        occurs in it only once.  Raises ValueError if that is not a number.
        """
        (select,) = _selections(self._rest.graph)
        retain = argument(select, "retain")
        if not isinstance(retain, int):
            raise ValueError(f"the tokens to retain are no number but {retain}")
        if retain != tokens:
            set_argument(select, "retain", tokens)
            self._rest.recompile()

    def __call__(self, *inputs: Any) -> Any:
        key = _digest(inputs)
        if key in self.known:
            for number, value in zip(self._written, self.known[key][1], strict=True):
                inputs[number].copy_(value)
        else:
            made = self._first(*inputs)
            self.known[key] = made, [inputs[number].clone() for number in self._written]
        values = [
            value.clone() if returned and isinstance(value, torch.Tensor) else value
            for value, returned in zip(self.known[key][0], self._returned, strict=True)
        ]  # a caller may write to the results
        return self._rest(*(inputs[number] for number in self._given), *values)


def _selections(graph: Graph) -> list[Node]:
    operator = torch.ops.dartfx.select_tokens.default
    return list(graph.find_nodes(op="call_function", target=operator))


def _part(
    module: GraphModule, nodes: Sequence[Node], given: Sequence[Node], result: Any
) -> GraphModule:
    """Extract these nodes as a module, from values of other nodes to a result."""
    part, copies = Graph(), {}
    for node in given:
        copies[node] = part.placeholder(node.name)
    for node in nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(torch.fx.map_arg(result, copies.__getitem__))
    return GraphModule(module, part)


def _digest(inputs: Sequence[Any]) -> bytes:
    """A digest of the values of all inputs, parameters included."""
    digest = hashlib.blake2b()
    for value in inputs:
        if isinstance(value, torch.Tensor):
            digest.update(repr((value.dtype, value.shape)).encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()
