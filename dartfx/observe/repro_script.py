"""Writes ``repro.py``: one dynamo graph as a script that rebuilds it and runs the pipeline on it.

The script holds operators, shapes, module paths and source lines; no weights, no inputs, no model.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import _get_qualified_name

from dartfx.config.options import DartConfig
from dartfx.passes.frontend.normalise import example_values
from dartfx.passes.graph import Size, expr, frame, hint, module_paths
from dartfx.selection.registry import BUILT_IN

__all__ = ["Arrival", "script"]

Arrival = tuple[int, int, bool]
"""A vision mask from outside the graph: the input that came with it (or has the mask's shape), its
feature rows, and whether the caller gave it (dartfx.vision_tokens)."""

# Neither changes what the passes do.
_LEFT_OUT = {"dump", "on_unsupported", "lowering", "inductor", "mode", "kernel"}
_SMALL = 64  # values of a constant that are worth writing down

_SCRIPT = '''\
"""A graph that dartfx met, without its model: python repro.py [--dump DIR] [--[no-]run]

Sends the graph through the passes, then runs it, pruned and unpruned, on random inputs.
Written by dartfx {dartfx}, torch {torch}, Python {python}.
"""

import argparse

import torch
from sympy import Max, Min, Mod

from dartfx.observe.replay import Replay, find, missing

OPTIONS = {options}
HOST = {host}  # may break the graph, recounts caches
ARRIVAL = {arrival}  # the input a vision mask came with, feature rows, given by the caller

# Enclosing modules and source lines, by number.
MODULES = [
{modules}]
SOURCES = [
{sources}]


def at(module, source):
    return MODULES[module], None if source is None else SOURCES[source]


{functions}

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", help="directory for the graph after every pass")
    parser.add_argument(
        "--run", action=argparse.BooleanOptionalAction,
        help="run the graph on random inputs (default: where they fit into half of the memory)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    given = vars(parser.parse_args(arguments))
    replay = Replay()
    graph(replay)
    return replay.run(OPTIONS, host=HOST, arrival=ARRIVAL, **given)


if __name__ == "__main__":
    main()
'''


def script(
    config: DartConfig,
    module: GraphModule,
    host: tuple[bool, bool] = (False, False),
    arrival: Arrival | None = None,
) -> str:
    """The source of ``repro.py`` for a graph as dynamo gave it.

    host: whether the caller may break the graph, and recounts caches; arrival: see
    :mod:`dartfx.observe.replay`.  What cannot be written down becomes a call that says so when it
    is run.
    """
    import dartfx

    writer = _Writer()
    functions = "\n".join(writer.function("graph", module))
    return _SCRIPT.format(
        dartfx=dartfx.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        options=repr(_options(config)),
        host=host,
        arrival=arrival,
        modules=_listed(writer.modules),
        sources=_listed(writer.sources),
        functions=functions,
    )


def _options(config: DartConfig) -> dict[str, object]:
    """The options that were given and that the passes read."""
    default = DartConfig()
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _LEFT_OUT}
    changed = {k: v for k, v in given.items() if v != getattr(default, k)}
    # A selector of the user's own is not registered where the script runs; the passes never look.
    if changed.get("selector", "dart") not in BUILT_IN:
        del changed["selector"]
    return changed


def _listed(entries: dict[Any, int]) -> str:
    return "".join(f"    {entry!r},\n" for entry in entries)


class _Writer:
    """Turns graphs into functions of a Replay; modules and sources are numbered as they come."""

    def __init__(self) -> None:
        self.modules: dict[tuple[str, ...], int] = {}
        self.sources: dict[tuple[str, int, str, str], int] = {}
        self._sized: dict[sympy.Symbol, int] = {}

    def function(self, name: str, module: GraphModule) -> Iterator[str]:
        """The lines of ``def name(replay)``, after those of the graphs inside it."""
        lines, inner = [f"def {name}(replay):"], []
        if name == "graph":
            lines += [f"    {line}" for line in self._sizes(example_values(module))]
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(_attribute(module, node), GraphModule):
                inner += [*self.function(f"{name}_{node.name}", _attribute(module, node)), "", ""]
            lines.append(f"    {self._line(name, module, node)}")
        yield from (*inner, *lines, "")

    def _sizes(self, examples: list[Any]) -> Iterator[str]:
        """One symbolic size per symbol of the inputs, with the example that dynamo saw."""
        found = [s for e in examples for s in (e.shape if isinstance(e, Tensor) else [e])]
        symbolic = [s for s in found if isinstance(s, torch.SymInt)]
        bare = {expr(s): hint(s) for s in symbolic if expr(s).is_Symbol}
        for size in symbolic:
            for symbol in sorted(expr(size).free_symbols, key=str):
                if symbol not in self._sized:
                    example = bare.get(symbol, 2 + len(self._sized))
                    self._sized[symbol] = example
                    yield f"{str(symbol).upper()} = replay.size({example})"

    def _line(self, function: str, module: GraphModule, node: Node) -> str:
        if node.op == "output":
            return f"replay.output({_literal(node.args[0])})"
        if node.op == "placeholder":
            value, state = self._value(node.meta.get("example_value")), ""
            if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
                state = ", state=True"
            return f"{node.name} = replay.input({node.name!r}, {value}{state})"
        if node.op == "get_attr":
            return self._get_attr(function, node, _attribute(module, node))
        if node.op == "call_module":
            return f"{node.name} = missing({f'a call of module {node.target}'!r})"
        parts = [repr(node.name), _target(node.target), _literal(node.args)]
        parts += [_literal(dict(node.kwargs)), self._origin(node)]
        return f"{node.name} = replay.call({', '.join(parts)})"

    def _get_attr(self, function: str, node: Node, value: Any) -> str:
        name = str(node.target).replace(".", "_")
        if isinstance(value, GraphModule):
            written = f"{function}_{node.name}"
        elif isinstance(value, Tensor) and value.numel() <= _SMALL and not _is_fake(value):
            device = f"device=replay.device({str(value.device)!r})"
            written = f"torch.tensor({_literal(value.tolist())}, dtype={value.dtype}, {device})"
        else:
            written = self._value(value, "constant")
        return f"{node.name} = replay.attribute({name!r}, {written})"

    def _value(self, value: Any, kind: str = "tensor") -> str:
        if isinstance(value, Tensor):
            number = getattr(value, "item_memo", None)
            if isinstance(number, torch.SymFloat | torch.SymInt) and number.node.hint is not None:
                return f"replay.scalar({number.node.hint!r})"
            shape, stride = _sizes(value.shape), _sizes(value.stride())
            return f"replay.{kind}({shape}, {stride}, {value.dtype}, {str(value.device)!r})"
        return _size(value) if isinstance(value, int | torch.SymInt) else _literal(value)

    def _origin(self, node: Node) -> str:
        module = self.modules.setdefault(tuple(module_paths(node)), len(self.modules))
        found = frame(node)
        if found is None:
            return f"at({module}, None)"
        return f"at({module}, {self.sources.setdefault(found, len(self.sources))})"


def _attribute(module: GraphModule, node: Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _sizes(sizes: Any) -> str:
    return f"({''.join(f'{_size(s)}, ' for s in sizes)})"


def _size(size: Size) -> str:
    """A size in terms of the symbols, which are written in capitals: no node is named so."""
    if isinstance(size, bool) or type(size) is int:
        return repr(size)
    found = expr(size)
    return str(found.xreplace({s: sympy.Symbol(str(s).upper()) for s in found.free_symbols}))


def _target(target: Callable[..., Any] | str) -> str:
    if isinstance(target, str):
        return repr(target)
    try:
        return f"find({_get_qualified_name(target)!r})"
    except RuntimeError:  # a function that no module holds
        return _missing(target)


def _literal(value: Any) -> str:
    """A node's argument as Python source."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(v)}, ' for v in value)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_literal(value.start)}, {_literal(value.stop)}, {_literal(value.step)})"
    if isinstance(value, float):
        return f"float({str(value)!r})" if value - value != 0 else repr(value)
    if value is None or value is Ellipsis or isinstance(value, bool | int | str | complex | bytes):
        return repr(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    return _target(value) if callable(value) else _missing(value)


def _missing(value: object) -> str:
    return f"missing({f'{type(value).__name__} {value!r:.80}'!r})"
