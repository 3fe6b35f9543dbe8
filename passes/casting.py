"""Under which autocast a node runs, so that its fake value has the dtype that its real one has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from dartfx import compat

# (device type, dtype, enabled, cache) of each autocast that is open, the innermost last.
Settings = tuple[tuple[Any, ...], ...]
_NOTE = "dartfx_autocast"


def note_autocast(graph: Graph) -> None:
    """Note on every node the autocast regions that it is in."""
    opened: dict[Node, tuple[Any, ...]] = {}
    enter, leave = compat.enter_autocast, compat.exit_autocast  # a lookup takes its time
    for node in graph.nodes:
        if opened:
            node.meta[_NOTE] = tuple(opened.values())
        if node.target is enter:
            opened[node] = node.args
        elif node.target is leave:
            opened.pop(node.args[0], None)


def notes_before(anchor: Node, copied: Node | None = None) -> dict[str, Any]:
    """The notes of a node that is inserted before ``anchor``, perhaps a copy of another.

    A copy is part of no region that its original is part of.
    """
    notes = {} if copied is None else dict(copied.meta)
    for name in ("custom", _NOTE):
        notes.pop(name, None)
    return notes | {_NOTE: anchor.meta.get(_NOTE, ())}


def noted(node: Node) -> Settings:
    """The autocast regions that a node is in."""
    settings: Settings = node.meta.get(_NOTE, ())
    return settings


@contextlib.contextmanager
def as_noted(node: Node) -> Iterator[None]:
    """Compute as ``node`` will."""
    with contextlib.ExitStack() as stack:
        for settings in noted(node):
            stack.enter_context(_casting(*settings))
        yield


def interpreter(module: GraphModule) -> Interpreter:
    """What runs a graph under its own autocast regions.

    torch's own where there are none: a frame more on the stack of every call makes a trace, which
    records stacks, a tenth slower.
    """
    entered = module.graph.find_nodes(op="call_function", target=compat.enter_autocast)
    return CastingInterpreter(module) if entered else Interpreter(module)


class CastingInterpreter(Interpreter):
    """Runs a graph for a tracer: under its own autocast regions, which that only records."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._opened: dict[Any, contextlib.ExitStack] = {}
        self._enter, self._leave = compat.enter_autocast, compat.exit_autocast
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._opened:
                self._opened.popitem()[1].close()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") == "_get_data_attr":
            # ``x.data``, of which a tracer sees a constant
            return args[0].detach()
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is self._enter:
            self._opened[n] = region = contextlib.ExitStack()
            region.enter_context(_casting(*n.args))
        elif n.target is self._leave and n.args[0] in self._opened:
            self._opened.pop(n.args[0]).close()
        return result


@contextlib.contextmanager
def _casting(device: Any, dtype: Any, enabled: Any, cache: Any = None) -> Iterator[None]:
    """torch.autocast, which a tracer would record, without its cache of weights."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype or before[1])
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(cached)
