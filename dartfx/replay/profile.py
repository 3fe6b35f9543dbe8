"""Measured time of each region of a graph, unpruned and pruned, with its FLOPs and bytes.

``repro.py --profile`` and ``dartfx profile`` show it.  Operators run one by one: Inductor fuses
across regions, so that its kernels belong to none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function

from dartfx.backend.request import CallerCapabilities, request_of
from dartfx.config.options import DartConfig
from dartfx.observe.repro_inputs import draw
from dartfx.passes.analysis.cost import bytes_of, node_flops
from dartfx.passes.graph import depends_on_data, module_paths, sizes, split_index, tensor, upstream
from dartfx.passes.outcome import Pruned
from dartfx.passes.runner import Observer
from dartfx.passes.site import Site
from dartfx.replay.measured import Profile, Region
from dartfx.replay.progress import Progress
from dartfx.replay.run import copies
from dartfx.replay.steps import copy, rewritten

__all__ = ["REGIONS", "NotPruned", "measure", "pruned_or_raise"]

_RUNS = 3  # of each graph, whose mean is shown, after one that is not recorded
TOWER, EMBEDDINGS, EARLY, SELECTION, LATE, HEAD = REGIONS = (
    "vision tower", "embeddings", "layers before the cut", "selection and gathers",
    "layers behind the cut", "head",
)  # fmt: skip
GRAPHS = ("unpruned", "pruned")


class NotPruned(Exception):
    """There is no pruned graph to measure."""


class _Sides(NamedTuple):
    """Both graphs, and the region of every call in each."""

    modules: tuple[GraphModule, GraphModule]
    regions: tuple[dict[Node, str], dict[Node, str]]


def measure(
    module: GraphModule,
    config: DartConfig,
    caller: CallerCapabilities,
    recorded: Mapping[str, Tensor],
    seed: int,
    trace: str | None,
) -> Profile:
    """Run the graph unpruned and pruned, operator by operator; write a Chrome trace of both.

    module: as dynamo made it; recorded, seed: as :func:`repro_inputs.draw` takes them.  Raises
    NotPruned.
    """
    sides = _sides(module, config, caller)
    values = draw(module, recorded, seed)
    seconds = _run(sides, values, trace)
    return Profile(
        tuple(
            Region(
                name,
                (seconds.get((GRAPHS[0], name), 0.0), seconds.get((GRAPHS[1], name), 0.0)),
                _both(_flops, sides, name),
                _both(bytes_of, sides, name),
            )
            for name in REGIONS
            if any(name in found.values() for found in sides.regions)
        ),
        _device(values),
        _RUNS,
    )


def _sides(module: GraphModule, config: DartConfig, caller: CallerCapabilities) -> _Sides:
    located: list[tuple[GraphModule, set[str]]] = []

    def observe(name: str, graph: GraphModule, site: Site | None = None, /) -> None:
        # Before the first cut: every name still means what it does in the unpruned graph.
        if name == "locate" and site is not None and not located:
            located.append((copy(graph), {node.name for node in upstream(site.vision.features)}))

    outcome, pruned = pruned_or_raise(module, config, caller, observe)
    unpruned, tower = located[0]
    before = _regions(unpruned, outcome, tower)
    old = {node.name: region for node, region in before.items()}
    # What has no name in the unpruned graph came with the selection.
    after = {node: old.get(node.name, SELECTION) for node in _calls(pruned)}
    return _Sides((unpruned, pruned), (before, after))


def pruned_or_raise(
    module: GraphModule, config: DartConfig, caller: CallerCapabilities, observe: Observer
) -> tuple[Pruned, GraphModule]:
    """What pruning makes of dynamo's graph.  Raises NotPruned."""
    outcome, pruned = rewritten(module, request_of(config, caller), observe)
    if not isinstance(outcome, Pruned):
        raise NotPruned("no vision tokens enter this graph" if outcome is None else str(outcome))
    return outcome, pruned


def _calls(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _regions(module: GraphModule, outcome: Pruned, tower: set[str]) -> dict[Node, str]:
    """The region of every call of the unpruned graph.

    Layers are known by their module, the tower by what the vision features are computed from;
    nodes between layers count towards the layer before them.
    """
    calls = _calls(module)
    layer_of = {node: layer for node in calls if (layer := _layer(node, outcome.stack)) is not None}
    last = max((position for position, node in enumerate(calls) if node in layer_of), default=-1)
    found: dict[Node, str] = {}
    here = EMBEDDINGS
    for position, node in enumerate(calls):
        if node in layer_of:
            here = EARLY if layer_of[node] < outcome.layer else LATE
        elif position > last:
            here = HEAD
        found[node] = TOWER if node.name in tower and node not in layer_of else here
    return found


def _layer(node: Node, stack: str) -> int | None:
    """The index of the decoder layer that holds a node."""
    for path in module_paths(node):
        found = split_index(path)
        if found is not None and found[0] == stack:
            return found[1]
    return None


class _ByRegion(Interpreter):
    """Runs a graph with each region's operators under the region's name."""

    def __init__(self, module: GraphModule, names: Mapping[Node, str]) -> None:
        super().__init__(module)
        self._names = names

    def run_node(self, n: Node) -> Any:
        if n not in self._names:
            return super().run_node(n)
        with record_function(self._names[n]):
            return super().run_node(n)


def _run(sides: _Sides, values: Sequence[Any], trace: str | None) -> dict[tuple[str, str], float]:
    """Mean seconds by graph and region; of its kernels where they ran on a GPU."""
    names = {_label(graph, region): (graph, region) for graph in GRAPHS for region in REGIONS}
    runners = [
        _ByRegion(module, {node: _label(graph, region) for node, region in found.items()})
        for graph, module, found in zip(GRAPHS, *sides, strict=True)
    ]
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.no_grad(), Progress("profile", 2 * (_RUNS + 1)) as progress:
        for runner in runners:
            runner.run(*copies(values))
            progress.step()
        with profile(activities=activities) as profiler:
            for runner in runners * _RUNS:
                runner.run(*copies(values))
                progress.step()
    if trace is not None:
        profiler.export_chrome_trace(trace)
    return {
        names[event.key]: (event.device_time_total or event.cpu_time_total) / 1e6 / _RUNS
        for event in profiler.key_averages()
        if event.key in names
    }


def _label(graph: str, region: str) -> str:
    return f"dartfx, {graph}: {region}"


def _device(values: Sequence[Any]) -> str:
    kinds = sorted({value.device.type for value in values if isinstance(value, Tensor)})
    return ", ".join(torch.cuda.get_device_name() if k == "cuda" else k.upper() for k in kinds)


def _both(
    count: Callable[[Sequence[Node]], int], sides: _Sides, region: str
) -> tuple[int, int]:  # fmt: skip
    one, other = (count(_sized(found, region)) for found in sides.regions)
    return one, other


def _flops(nodes: Sequence[Node]) -> int:
    return sum(map(node_flops, nodes))


def _sized(region_of: Mapping[Node, str], name: str) -> Sequence[Node]:
    """The region's values whose sizes are known before the graph runs."""
    return [
        node
        for node, region in region_of.items()
        if region == name and tensor(node) is not None
        if not any(
            depends_on_data(size)
            for n in (node, *node.all_input_nodes)
            if tensor(n) is not None
            for size in sizes(n)
        )
    ]
