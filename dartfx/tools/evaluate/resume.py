"""A pruned graph in two halves: what comes before the selection is computed once for each input.

Measuring selectors and numbers of tokens at one layer runs the same graph on the same prompts over
and over.  Up to the selection nothing of it depends on either, and that is most of the work.
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
    """Within it, pruned graphs that are lowered to eager are such halves, and keep R tokens.

    made: those made before, which new ones are added to.
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
    """A graph module that remembers what it computed before the selection.

    Raises ValueError where its second half writes to a value of the first.
    """

    def __init__(self, module: GraphModule) -> None:
        graph = module.graph
        after = set(_selections(graph))
        for node in graph.nodes:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        before = [n for n in graph.nodes if n not in after and n.op != "output"]
        for node in after:
            if any(base not in after for w in mutated_operands(node) for base in bases(w)):
                raise ValueError(f"{node} writes to a value from before the selection")
        handed = [n for n in before if any(u in after or u.op == "output" for u in n.users)]
        self._first = _part(module, before, [], handed)
        rest = [n for n in graph.nodes if n in after and n.op != "output"]
        self._rest = _part(module, rest, handed, graph.output_node().args[0])
        self.known: dict[bytes, Any] = {}

    def retain(self, tokens: int) -> None:
        """Keep so many vision tokens from now on: less than there are.

        The rewritten graph reads all sizes behind the cut off what the selection returns, so that
        R stands in one place of it.  Raises ValueError where it is no number there.
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
        if key not in self.known:
            self.known[key] = self._first(*inputs)
        return self._rest(*self.known[key])


def _selections(graph: Graph) -> list[Node]:
    operator = torch.ops.dartfx.select_tokens.default
    return list(graph.find_nodes(op="call_function", target=operator))


def _part(
    module: GraphModule, nodes: Sequence[Node], given: Sequence[Node], result: Any
) -> GraphModule:
    """These nodes as a module of its own, from values of others to a result."""
    part, copies = Graph(), {}
    for node in given:
        copies[node] = part.placeholder(node.name)
    for node in nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(torch.fx.map_arg(result, copies.__getitem__))
    return GraphModule(module, part)


def _digest(inputs: Sequence[Any]) -> bytes:
    """What tells inputs apart: the values of all of them, parameters included."""
    digest = hashlib.blake2b()
    for value in inputs:
        if isinstance(value, torch.Tensor):
            digest.update(repr((value.dtype, value.shape)).encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()
