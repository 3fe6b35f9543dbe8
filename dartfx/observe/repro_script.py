"""Writes ``repro.py``: a script that rebuilds one dynamo graph and compiles it.

The script holds operators, shapes, module paths and source lines; no weights, no inputs, no model.
Integer and bool inputs are in a separate file (:mod:`dartfx.observe.repro_inputs`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dartfx import compat
from dartfx._version import __version__
from dartfx.config.options import DartConfig
from dartfx.observe.repro_inputs import FILE
from dartfx.passes.frontend.normalise import example_values
from dartfx.passes.graph import Size, expr, frame, hint, module_paths
from dartfx.selection.registry import BUILT_IN

__all__ = ["RecordedMask", "changed_options", "script"]


class RecordedMask(NamedTuple):
    """A vision mask from outside the graph.

    input: number of the input that it came with, or that has the mask's [B, S]; rows: of vision
    features; given: whether the caller gave it (dartfx.vision_tokens).
    """

    input: int
    rows: int
    given: bool


# Neither changes what the passes do.
_OF_DUMPS = {"dump", "dump_graphs", "dump_passes"}
_LEFT_OUT = {"on_unsupported", "lowering", "inductor", "mode", "kernel"}
_SMALL = 64  # values of a constant that the script spells out

_SCRIPT = '''\
"""A graph that dartfx compiled, without its model: python repro.py [--help]

Runs the passes on the graph, then runs it, pruned and unpruned. Integer and bool inputs (token
ids, masks, positions) are read from {inputs} next to this script; floats are random.
Written by dartfx {dartfx}, torch {torch}, Python {python}.
"""

import argparse
from pathlib import Path

import torch
from sympy import Max, Min, Mod

from dartfx.replay.rebuild import Replay, find, missing
from dartfx.observe.repro_script import RecordedMask

OPTIONS = {options}
CALLER = {caller}
MASK = {mask}

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
        help="run the graph (default: if its inputs take less than half of the memory)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random floats")
    parser.add_argument(
        "--time", nargs="?", const="eager", choices=("eager", "aot_eager", "inductor"),
        help="time the graph, pruned and not, compiled so (default: eager)",
    )
    parser.add_argument("--pass", dest="after", help="stop after this pass and print the graph")
    parser.add_argument(
        "--bisect", action="store_true",
        help="find the first pass after which the numbers differ, with all tokens retained",
    )
    parser.add_argument(
        "--profile", metavar="TRACE",
        help="time each region next to its FLOPs, and write this Chrome trace (.json)",
    )
    parser.add_argument(
        "--export", metavar="FILE",
        help="write both graphs to this file (.json) for Model Explorer",
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of --bisect, relative")
    given = vars(parser.parse_args(arguments))
    replay = Replay()
    graph(replay)
    folder = Path(__file__).parent
    return replay.run(OPTIONS, caller=CALLER, mask=MASK, folder=folder, **given)


if __name__ == "__main__":
    main()
'''


def script(
    config: DartConfig,
    module: GraphModule,
    caller: Mapping[str, bool],
    mask: RecordedMask | None = None,
) -> str:
    """The source of ``repro.py`` for a graph as dynamo made it.

    caller: fields of CallerCapabilities; mask: how a vision mask came to the graph.  What cannot be
    recorded becomes a call that raises an error when the script runs.
    """
    writer = _Writer()
    functions = "\n".join(writer.function("graph", module))
    return _SCRIPT.format(
        dartfx=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        options=repr(_options(config)),
        inputs=FILE,
        caller=dict(caller),
        mask=mask,
        modules=_listed(writer.modules),
        sources=_listed(writer.sources),
        functions=functions,
    )


def changed_options(config: DartConfig) -> dict[str, object]:
    """The options that differ from the defaults, but for those of dumps themselves."""
    default = DartConfig()
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OF_DUMPS}
    return {k: v for k, v in given.items() if v != getattr(default, k)}


def _options(config: DartConfig) -> dict[str, object]:
    """The changed options that the passes read."""
    changed = {k: v for k, v in changed_options(config).items() if k not in _LEFT_OUT}
    # A user's selector is not registered where the script runs; the passes do not call it.
    if changed.get("selector", "dart") not in BUILT_IN:
        del changed["selector"]
    return changed


def _listed(entries: dict[Any, int]) -> str:
    return "".join(f"    {entry!r},\n" for entry in entries)


class _Writer:
    """Turns graphs into functions of a Replay, and numbers modules and sources."""

    def __init__(self) -> None:
        self.modules: dict[tuple[str, ...], int] = {}
        self.sources: dict[tuple[str, int, str, str], int] = {}
        self._sized: dict[sympy.Symbol, int] = {}

    def function(self, name: str, module: GraphModule) -> Iterator[str]:
        """The lines of ``def name(replay)``, after those of nested graphs."""
        lines, inner = [f"def {name}(replay):"], []
        if name == "graph":
            lines += [f"    {line}" for line in self._sizes(example_values(module))]
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(_attribute(module, node), GraphModule):
                inner += [*self.function(f"{name}_{node.name}", _attribute(module, node)), "", ""]
            lines.append(f"    {self._line(name, module, node)}")
        yield from (*inner, *lines, "")

    def _sizes(self, examples: list[Any]) -> Iterator[str]:
        """One symbolic size per symbol of the inputs, with the traced example."""
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
            if compat.STATIC_INPUT in node.meta.get("tensor_dict", {}):
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
    return isinstance(value, compat.FakeTensor)


def _sizes(sizes: Any) -> str:
    return f"({''.join(f'{_size(s)}, ' for s in sizes)})"


def _size(size: Size) -> str:
    """A size in terms of the symbols, in capitals, which no node's name is."""
    if isinstance(size, bool) or type(size) is int:
        return repr(size)
    found = expr(size)
    return str(found.xreplace({s: sympy.Symbol(str(s).upper()) for s in found.free_symbols}))


def _target(target: Callable[..., Any] | str) -> str:
    if isinstance(target, str):
        return repr(target)
    try:
        return f"find({compat.get_qualified_name(target)!r})"
    except compat.Unavailable:
        raise
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
