"""``repro.py --profile``: measured time of each region of a graph beside its FLOPs and bytes.

Regions are those of the pruned graph: before the decoder (a vision tower, if the graph holds one),
its layers before the cut, the selection, its layers behind the cut, and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function

from dartfx.backend.request import CallerCapabilities, request_of
from dartfx.config.options import DartConfig
from dartfx.observe.repro_inputs import draw
from dartfx.passes.analysis.cost import bytes_of, node_flops
from dartfx.passes.graph import depends_on_data, module_paths, sizes, split_index, tensor
from dartfx.passes.outcome import Pruned
from dartfx.replay.run import copies
from dartfx.replay.steps import rewritten

__all__ = ["profiled"]

_RUNS = 3  # whose mean is shown, after one that is not recorded
REGIONS = (
    "before the decoder", "layers before the cut", "selection", "layers behind the cut", "head",
)  # fmt: skip
_PREFIX = "dartfx: "


def profiled(
    module: GraphModule,
    config: DartConfig,
    caller: CallerCapabilities,
    recorded: Mapping[str, Tensor],
    seed: int,
    trace: str,
) -> Iterator[str]:
    """Run the pruned graph, operator by operator, and write a Chrome trace.

    Yields the lines of a table, and a sentence for each region where time and FLOPs part.  Times
    are those of eager operators: Inductor fuses across regions.
    """
    outcome, pruned = rewritten(module, request_of(config, caller))
    if not isinstance(outcome, Pruned):
        yield f"not profiled: the graph is not pruned ({outcome})"
        return
    region_of = _regions(pruned, outcome)
    runner, values = _ByRegion(pruned, region_of), draw(module, recorded, seed)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.no_grad():
        runner.run(*copies(values))
        with profile(activities=activities) as profiler:
            for _ in range(_RUNS):
                runner.run(*copies(values))
    profiler.export_chrome_trace(str(Path(trace)))
    yield from _table(region_of, _seconds(profiler))
    yield f"wrote {trace}, for chrome://tracing or ui.perfetto.dev"


class _ByRegion(Interpreter):
    """Runs a graph with each region's operators under the region's name."""

    def __init__(self, module: GraphModule, region_of: Mapping[Node, str]) -> None:
        super().__init__(module)
        self._region_of = region_of

    def run_node(self, n: Node) -> Any:
        if n not in self._region_of:
            return super().run_node(n)
        with record_function(_PREFIX + self._region_of[n]):
            return super().run_node(n)


def _regions(module: GraphModule, outcome: Pruned) -> dict[Node, str]:
    """The region of every call: layers by their module, the rest by where it stands.

    What stands between layers and belongs to none of them is the selection and its gathers.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    layer_of = {node: layer for node in calls if (layer := _layer(node, outcome.stack)) is not None}
    inside = [place for place, node in enumerate(calls) if node in layer_of]
    first, last = (inside[0], inside[-1]) if inside else (len(calls), len(calls))
    found: dict[Node, str] = {}
    for place, node in enumerate(calls):
        if "dartfx" in str(node.target):
            found[node] = REGIONS[2]
        elif node in layer_of:
            found[node] = REGIONS[1] if layer_of[node] < outcome.layer else REGIONS[3]
        else:
            found[node] = REGIONS[0 if place < first else 2 if place < last else 4]
    return found


def _layer(node: Node, stack: str) -> int | None:
    """The index of the decoder layer that holds a node."""
    for path in module_paths(node):
        found = split_index(path)
        if found is not None and found[0] == stack:
            return found[1]
    return None


def _seconds(profiler: profile) -> dict[str, float]:
    """Mean seconds of each region in one run; of its kernels where they ran on a GPU."""
    found = {}
    for event in profiler.key_averages():
        if event.key.startswith(_PREFIX):
            micros = event.device_time_total or event.cpu_time_total
            found[event.key.removeprefix(_PREFIX)] = micros / 1e6 / _RUNS
    return found


def _table(region_of: Mapping[Node, str], seconds: Mapping[str, float]) -> Iterator[str]:
    flops = {name: sum(map(node_flops, _sized(region_of, name))) for name in REGIONS}
    held = {name: bytes_of(_sized(region_of, name)) for name in REGIONS}
    whole, all_flops = sum(seconds.values()) or 1.0, sum(flops.values()) or 1
    yield f"{'region':<22} {'time':>12} {'share':>6} {'GFLOP':>9} {'share':>6} {'MB':>9}"
    for name in REGIONS:
        time, share = seconds.get(name, 0.0), seconds.get(name, 0.0) / whole
        yield (
            f"{name:<22} {1000 * time:>9.3f} ms {share:>6.0%} {flops[name] / 1e9:>9.4f} "
            f"{flops[name] / all_flops:>6.0%} {held[name] / 1e6:>9.3f}"
        )
    for name in REGIONS:
        time_share, flop_share = seconds.get(name, 0.0) / whole, flops[name] / all_flops
        if abs(time_share - flop_share) > 0.1:
            how = "more" if time_share > flop_share else "less"
            shares = f"{time_share:.0%} of the time for {flop_share:.0%} of the FLOPs"
            yield f"{name}: {shares}, {how} than its arithmetic explains"


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
