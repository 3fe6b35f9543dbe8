"""Options of ``repro.py``: stop after a pass, find the wrong pass, time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from dartfx import compat
from dartfx.backend.lowering import lower
from dartfx.backend.request import CallerCapabilities, request_of
from dartfx.backend.rewrite import rewrite
from dartfx.config.options import DartConfig
from dartfx.observe.repro_inputs import draw
from dartfx.observe.repro_script import RecordedMask
from dartfx.passes.frontend.inline_higher_order import inline_higher_order
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.graph import render
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.request import Request
from dartfx.passes.runner import Observer
from dartfx.passes.site import Site
from dartfx.replay.progress import Progress
from dartfx.replay.run import copies, mask_present

__all__ = ["UnknownPass", "after_pass", "bisect", "copy", "rewritten", "timed"]

_RUNS = 5  # of which the median is shown, after one that is not timed


class UnknownPass(Exception):
    """No pass of this name ran."""


class _Stop(BaseException):
    """Ends the passes from an observer; what catches an Exception must let it through."""


def rewritten(
    module: GraphModule, request: Request, observe: Observer | None = None
) -> tuple[Outcome | None, GraphModule]:
    """What the passes make of dynamo's graph."""
    flat = inline_higher_order(module)
    outcome, result, _ = rewrite(lambda: normalise(flat), flat, request, observe=observe)
    return outcome, result


def after_pass(module: GraphModule, config: DartConfig, caller: CallerCapabilities, name: str
               ) -> str:  # fmt: skip
    """The graph as it is after one pass; the later ones do not run.  Raises UnknownPass."""
    ran: list[str] = []

    def observe(done: str, graph: GraphModule, site: Site | None = None, /) -> None:
        ran.append(done)
        if done == name:
            raise _Stop(render(graph))

    try:
        rewritten(module, request_of(config, caller), observe)
    except _Stop as stopped:
        return str(stopped)
    raise UnknownPass(f"no pass {name!r} ran; these did: {', '.join(ran)}")


def bisect(
    module: GraphModule,
    config: DartConfig,
    caller: CallerCapabilities,
    recorded: Mapping[str, Tensor],
    seed: int,
    tolerance: float,
) -> Iterator[str]:
    """Run the graph after each pass with all tokens retained, which changes no number.

    Yields a line per pass: the largest difference from the original's outputs, relative to their
    largest value, and at last the first pass after which it is above the tolerance.
    """
    outcome, snapshots = _snapshots(module, config, caller)
    values = draw(module, recorded, seed)
    wanted = _outputs(module, values)
    wrong, apart_after = "", []
    with Progress("bisect", len(snapshots)) as progress:
        for _, graph in snapshots:
            apart_after.append(_tried(graph, values, wanted))
            progress.step()
    for (name, _), (apart, shown) in zip(snapshots, apart_after, strict=True):
        differs = not apart <= tolerance
        wrong = wrong or (name if differs else "")
        yield f"after {name:<12} {shown}{'  <- first above the tolerance' * (name == wrong)}"
    if not isinstance(outcome, Pruned):
        yield f"the passes stopped: {outcome}"
    yield (
        f"the first pass with other numbers: {wrong}"
        if wrong
        else (f"no pass changes the numbers by more than {tolerance:g}")
    )


def _tried(
    graph: GraphModule, values: Sequence[Any], wanted: Sequence[Tensor]
) -> tuple[float, str]:
    """How far a graph's outputs are from the expected ones, as a number and as text."""
    try:
        apart = _apart(wanted, _outputs(graph, values))
    except Exception as error:  # a wrong graph may fail in any way
        return float("inf"), f"fails: {str(error).splitlines()[0]}"
    return apart, f"largest difference {apart:.1e}"


def _snapshots(
    module: GraphModule, config: DartConfig, caller: CallerCapabilities
) -> tuple[Outcome | None, list[tuple[str, GraphModule]]]:
    """The outcome with all tokens retained, and the graph after each pass."""
    request = request_of(config, caller)
    everything = [dataclasses.replace(s, retain=lambda n: n) for s in request.stages]
    unshortened = dataclasses.replace(request, stages=tuple(everything), always=True)
    found: list[tuple[str, GraphModule]] = []

    def observe(name: str, graph: GraphModule, site: Site | None = None, /) -> None:
        found.append((name, copy(graph)))

    outcome, _ = rewritten(module, unshortened, observe)
    return outcome, found


def timed(
    module: GraphModule,
    compiled: Callable[..., Any],
    config: DartConfig,
    recorded: Mapping[str, Tensor],
    mask: RecordedMask | None,
    seed: int,
) -> Iterator[str]:
    """The graph's time unpruned and pruned, each compiled by the config's lowering."""
    values = draw(module, recorded, seed)
    with torch.no_grad():
        unpruned = _median(lower(config, module, copies(values)), values, None)
        pruned = _median(compiled, values, mask)
    how = f"median of {_RUNS} runs, lowering {config.lowering!r}"
    yield f"time unpruned: {1000 * unpruned:.3g} ms ({how})"
    yield f"time pruned:   {1000 * pruned:.3g} ms, {unpruned / pruned:.2f}x as fast"


def _median(function: Callable[..., Any], values: Sequence[Any], mask: RecordedMask | None
            ) -> float:  # fmt: skip
    taken = []
    with Progress("time", _RUNS + 1) as progress:
        for _ in range(_RUNS + 1):
            own = copies(values)
            with mask_present(mask, own):
                _wait(own)
                start = time.perf_counter()
                function(*own)
                _wait(own)
            taken.append(time.perf_counter() - start)
            progress.step()
    return statistics.median(taken[1:])


def _wait(values: Sequence[Any]) -> None:
    for kind in {v.device.type for v in values if isinstance(v, Tensor)} - {"cpu", "meta"}:
        torch.get_device_module(kind).synchronize()


def copy(module: GraphModule) -> GraphModule:
    """The graph as it is now, over the same attributes."""
    graph = Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    return GraphModule(module, graph)


def _outputs(module: GraphModule, values: Sequence[Any]) -> list[Tensor]:
    with torch.no_grad():
        leaves = compat.pytree.tree_leaves(module(*copies(values)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _apart(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest value; infinite for other shapes."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return float("inf")
    largest = 0.0
    for one, other in zip(wanted, found, strict=True):
        if one.numel():
            one, other = one.double(), other.double()
            scale = max(float(one.abs().max()), 1e-30)
            largest = max(largest, float((one - other).abs().max()) / scale)
    return largest
