"""The passes in order: locate -> infer axes -> insert -> gather -> shrink -> trim -> check.

:func:`prune` rewrites a normalised graph in place and returns what it did; when a pass refuses,
the caller drops that graph and compiles dynamo's original, so nothing is ever half rewritten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.fx import GraphModule

from dartfx.passes.analysis import locate
from dartfx.passes.analysis.cost import bytes_of, flops
from dartfx.passes.graph import Size, hint, sizes, value_of
from dartfx.passes.internal_error import internal_error
from dartfx.passes.outcome import Outcome, Pruned, Unchanged
from dartfx.passes.request import Request
from dartfx.passes.site import Site, Stack, Vision
from dartfx.passes.transform import insert_selection, trim_kv_cache
from dartfx.passes.transform.apply_cut import CutRegion, cut

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told of the graph after each pass, and of the place of the cut once it is known."""

    def __call__(self, name: str, module: GraphModule, site: Site | None = None, /) -> None: ...


class PassTimer:
    """Seconds per pass; also tells an observer and the log when each pass has run."""

    def __init__(self, module: GraphModule, observe: Observer | None = None) -> None:
        self.seconds: dict[str, float] = {"normalise": module.meta.get("seconds", 0.0)}
        self._module, self._observe = module, observe
        self.current, self.round = "", 1
        self.site: Site | None = None
        self._log("normalise")

    def _log(self, name: str) -> None:
        nodes = len(self._module.graph.nodes)
        log.debug("pass %s: %.3f s, %d nodes", name, self.seconds[name], nodes)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        name = name if self.round == 1 else f"{name} {self.round}"
        self.current, start = name, time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self._log(name)
        if self._observe is not None:
            self._observe(name, self._module, self.site)


def prune(
    module: GraphModule,
    request: Request,
    vision: Callable[[GraphModule], Vision] | None = None,
    observe: Observer | None = None,
) -> Outcome | None:
    """Prune one normalised graph in place.

    vision: finds the vision tokens of a graph that does not hold the merge; None takes them from
    the merge in the graph.  Returns Pruned, Declined (why, where, what to try), Unchanged, or None
    when no vision tokens enter a decoder here (the graph is then unchanged).
    """
    clock = PassTimer(module, observe)
    try:
        return _prune(module, request, vision, clock)
    except Exception as error:
        return internal_error(clock.current, error)


def _prune(
    module: GraphModule,
    request: Request,
    vision: Callable[[GraphModule], Vision] | None,
    clock: PassTimer,
) -> Outcome | None:
    graph = module.graph
    with clock("locate"):
        entered = _entered(module, vision)
        if entered is None:
            return None
        sites = {s.layer: locate.locate(graph, s.layer, *entered) for s in request.stages}
        clock.site = sites[request.stages[0].layer]
    with clock("axes"):
        region = CutRegion(graph, clock.site)
        tokens, planned = insert_selection.plan_budgets(region.emitter(), clock.site, request)
        if not planned:
            return _all_retained(value_of(tokens), request)
        (stage, budget), *later = planned
        if stage is not request.stages[0]:
            clock.site = sites[stage.layer]
            region = CutRegion(graph, clock.site)
        left = _tokens_left(region.site, budget, planned[-1][1])
        leaves = trim_kv_cache.plan_cache_layout(
            region.site, region.output, region.axes, left, request
        )
        region.recompute()
    site, batch = region.site, sizes(region.site.hidden)[0]
    before = flops(site.stack.layer_of), bytes_of(leaves.caches)
    caches = leaves.caches if leaves.layout == "uniform" else {}
    needs = insert_selection.RuntimeChecks(
        bool(caches) and not request.gathers_decode_mask, None if later else leaves.window
    )
    made = [cut(module, region, stage, budget, needs, caches, clock)]
    for number, (stage, budget) in enumerate(later, 2):
        clock.round = number
        with clock("locate"):
            clock.site = locate.locate(graph, stage.layer, made[-1].left, site.stack)
        with clock("axes"):
            region = CutRegion(graph, clock.site)
        needs = insert_selection.RuntimeChecks(
            False, leaves.window if stage is planned[-1][0] else None
        )
        made.append(cut(module, region, stage, budget, needs, made[-1].uniform, clock))
    return Pruned(
        stack=site.stack.path,
        how=site.vision.how,
        batch=hint(batch),
        cuts=tuple(m.cut for m in made),
        kv_layout=leaves.layout if leaves.caches else "none returned",
        flops=(before[0], flops(site.stack.layer_of)),
        kv_bytes=(before[1], bytes_of(made[-1].uniform or leaves.caches)),
        seconds=clock.seconds,
    )


def _entered(
    module: GraphModule, vision: Callable[[GraphModule], Vision] | None
) -> tuple[Vision, Stack] | None:
    """Where the vision tokens are, and the decoder stack that they enter; None for neither."""
    stacks = locate.find_stacks(module.graph)
    if vision is None:
        return locate.find_vision(module.graph, stacks)
    entering = vision(module)
    return entering, locate.entered_stack(module.graph, stacks, entering.embeds)


def _tokens_left(site: Site, first: insert_selection.Budget, last: insert_selection.Budget) -> Size:
    """S' = S - N + R of the last cut, where R < N."""
    left: Size = sizes(site.hidden)[1] - value_of(first.vision_tokens) + value_of(last.retain)
    return left


def _all_retained(tokens: Size, request: Request) -> Unchanged:
    asked = hint(request.stages[-1].retain(tokens))
    text = f"nothing to drop: {asked} tokens to retain of {hint(tokens)}"
    return Unchanged(text, all_retained=True)
