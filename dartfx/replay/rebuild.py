"""Rebuilds the graph of a ``repro.py`` and compiles it, without the model or its weights.

:mod:`dartfx.observe.repro_script` writes such scripts.  The passes see fake tensors of the
recorded shapes, strides, dtypes and devices, so that a graph of any size can be rebuilt on any
machine; then :mod:`dartfx.replay.run` runs the graph, pruned and unpruned.
"""

from __future__ import annotations

import builtins
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate

from dartfx import compat
from dartfx.backend.graph_compiler import NeedsGraphBreaks, compile_graph
from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.observe import report, repro_inputs
from dartfx.observe.report import Report
from dartfx.observe.repro_script import RecordedMask
from dartfx.passes.frontend.normalise import fresh_size
from dartfx.passes.graph import Size
from dartfx.replay import examine
from dartfx.replay.measured import Profile
from dartfx.replay.profile import NotPruned, measure
from dartfx.replay.run import mask_present, reason_not_to_run

__all__ = ["Replay", "find", "missing"]

# (paths of the enclosing modules, "file", line, "function", "code")
Origin = tuple[tuple[str, ...], tuple[str, int, str, str] | None]


class Replay:
    """One graph, built in the order of the script: sizes, inputs, calls, output."""

    def __init__(self, mode: compat.FakeTensorMode | None = None) -> None:
        self.mode = mode or compat.FakeTensorMode(shape_env=ShapeEnv())
        self.root = nn.Module()
        self.graph = Graph()
        self.missing: set[str] = set()  # kinds of devices that this machine lacks
        self._scalars = 0

    def size(self, example: int) -> torch.SymInt:
        """A symbolic size with this example value."""
        return fresh_size(self.mode, example)

    def tensor(
        self, shape: Sequence[Size], stride: Sequence[Size], dtype: torch.dtype, device: str
    ) -> Tensor:
        """A fake tensor, on the CPU if this machine lacks the device."""
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=self.device(device))

    def constant(
        self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str
    ) -> Tensor:
        """A constant too large for the script: normal values, or zeros for integers."""
        made = torch.empty_strided(shape, stride, dtype=dtype, device=self.device(device))
        return made.normal_() if made.is_floating_point() else made.zero_()

    def device(self, name: str) -> torch.device:
        """The device of this name, or the CPU if this machine has none of its kind."""
        device = torch.device(name)
        try:
            present = (
                device.type in ("cpu", "meta") or torch.get_device_module(device).is_available()
            )
        except RuntimeError:  # torch was built without its module
            present = False
        if not present:
            self.missing.add(device.type)
        return device if present else torch.device("cpu")

    def _here(self, argument: Any) -> Any:
        """An argument with its devices replaced by :meth:`device`."""
        if isinstance(argument, torch.device):
            return self.device(str(argument))
        if isinstance(argument, str) and re.fullmatch(r"(cuda|xpu|mps|hpu|npu)(:\d+)?", argument):
            return str(self.device(argument))
        return argument

    def scalar(self, value: float) -> Tensor:
        """A fake number [] with a known value: how dynamo passes dynamic Python numbers."""
        self._scalars += 1
        source = compat.ConstantSource(f"scalar_{self._scalars}")
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        return self.mode.from_tensor(torch.tensor(value, dtype=dtype), source=source)

    def input(self, name: str, value: Any, *, state: bool = False) -> Node:
        """A placeholder; state: whether it is a parameter or a buffer."""
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        if state:
            node.meta["tensor_dict"] = {compat.STATIC_INPUT: "unguarded"}
        return node

    def attribute(self, name: str, value: Tensor | Callable[[Replay], None]) -> Node:
        """A constant of the graph, or a nested graph, built by a function of a Replay."""
        if not isinstance(value, Tensor):
            inner = Replay(self.mode)
            value(inner)
            self.missing |= inner.missing
            self.root.add_module(name, GraphModule(inner.root, inner.graph))
        else:
            self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def call(
        self,
        name: str,
        target: Callable[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        origin: Origin = ((), None),
    ) -> Node:
        """A call of a function, or of a method of the first argument."""
        op = "call_method" if isinstance(target, str) else "call_function"
        args, kwargs = map_aggregate((args, dict(kwargs)), self._here)
        node = self.graph.create_node(op, target, args, kwargs, name)
        paths, source = origin
        node.meta["nn_module_stack"] = {path: (path, "") for path in paths}
        if source is not None:
            file, line, function, code = source
            node.meta["stack_trace"] = f'  File "{file}", line {line}, in {function}\n    {code}\n'
        return node

    def output(self, value: Any) -> None:
        """What the graph returns."""
        self.graph.output(value)

    def run(
        self,
        options: Mapping[str, object],
        *,
        caller: Mapping[str, bool],
        mask: RecordedMask | None,
        folder: Path,
        dump: str | None = None,
        run: bool | None = None,
        seed: int = 0,
        time: str | None = None,
        after: str | None = None,
        export: str | None = None,
        bisect: bool = False,
        tolerance: float = 1e-5,
        profile: str | None = None,
    ) -> list[Report]:
        """Compile the graph, print and return its reports; then run it.

        caller: fields of CallerCapabilities; mask: how a vision mask came to the graph; folder:
        holds the recorded inputs; the others: see ``repro.py --help``.  Raises what the pruned
        graph raises on inputs that the unpruned one accepts, SystemExit for a wrong ``after``.
        """
        module = GraphModule(self.root, self.graph)
        given = {"lowering": time or "eager", "on_unsupported": "ignore", "dump": dump}
        config, can = DartConfig.from_options({**options, **given}), CallerCapabilities(**caller)
        ran = examine.Ran(module, None, config, can, mask, repro_inputs.load(folder), seed)
        if after is not None or export is not None:
            _print(examine.passes_lines(ran, after, export))
            return []
        with report.isolate_reports() as reports:
            compiled = self._compiled(config, module, can, mask)
        _print([*reports, *self._notes()])
        if run is not False:
            ran = ran._replace(pruned=compiled if any(r.pruned for r in reports) else None)
            reason = reason_not_to_run(module, ran.recorded, even_if_large=run is True)
            wanted = examine.wanted_lines(ran, time, profile, tolerance if bisect else None)
            _print(wanted if reason is None else [reason])
        return reports

    def profile(
        self,
        options: Mapping[str, object],
        *,
        caller: Mapping[str, bool],
        mask: RecordedMask | None,
        folder: Path,
        trace: str | None,
    ) -> Profile:
        """Time of each region and its FLOPs; arguments as of :meth:`run`, writes ``trace``.

        Raises NotPruned where there is no pruned graph, or where it cannot run here.
        """
        module, recorded = GraphModule(self.root, self.graph), repro_inputs.load(folder)
        config = DartConfig.from_options({**options, "on_unsupported": "ignore", "dump": None})
        if mask is not None:
            raise NotPruned(f"a profile {examine.NEEDS_MERGE}")
        if reason := reason_not_to_run(module, recorded, even_if_large=False):
            raise NotPruned(reason)
        return measure(module, config, CallerCapabilities(**caller), recorded, 0, trace)

    def _notes(self) -> list[str]:
        missing = ", ".join(sorted(self.missing))
        return [f"no {missing} here: using the CPU"] if missing else []

    def _compiled(
        self,
        config: DartConfig,
        module: GraphModule,
        caller: CallerCapabilities,
        mask: RecordedMask | None,
    ) -> Callable[..., Any] | None:
        """What the backend makes of the graph; None if it needs the call in several graphs."""
        examples = [n.meta["example_value"] for n in self.graph.nodes if n.op == "placeholder"]
        try:
            with mask_present(mask, examples):
                return compile_graph(config, module, examples, caller)
        except NeedsGraphBreaks as needs:
            print(f"needs graph breaks: {needs}")  # noqa: T201
            return None


def _print(lines: Iterable[object]) -> None:
    for line in lines:
        print(line)  # noqa: T201  its reader is a terminal


def find(name: str) -> Any:
    """The object of this qualified name.  Raises ImportError when a library is missing here."""
    parts = name.split(".")
    if len(parts) == 1:
        return getattr(builtins, name)
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            # The name goes on with a class or an operator's namespace, or the library is missing.
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"nothing here is called {name!r}; import the library that defines it first")


def missing(what: str) -> Any:
    """Replaces what the script could not record.  Raises NotImplementedError."""
    raise NotImplementedError(f"this repro could not record {what}; attach the model's code")
