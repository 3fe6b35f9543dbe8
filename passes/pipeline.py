"""The passes in order: locate -> infer axes -> insert -> gather -> shrink -> trim -> check.

:func:`prune` rewrites a normalised graph in place and returns what it did; when a pass refuses,
the caller drops that graph and compiles dynamo's original, so nothing is ever half rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.fx import GraphModule, Node

from dartfx.passes.analysis.budgets import PlannedCut, plan_budgets, vision_tokens
from dartfx.passes.analysis.cost import bytes_of, flops
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.kv_caches import CacheLayout, plan_cache_layout
from dartfx.passes.analysis.locate import entered_stack, find_stacks, find_vision, locate
from dartfx.passes.analysis.order_mixing import order_mixing
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.dropped.calibrate import calibrate, require_calibratable
from dartfx.passes.dropped.merge_dropped import merge_dropped
from dartfx.passes.frontend.causal_windows import fold_windows, unfold_windows
from dartfx.passes.graph import hint, sizes, source_line, value_of
from dartfx.passes.internal_error import internal_error
from dartfx.passes.outcome import Crossing, Cut, OrderMixing, Outcome, Pruned, Unchanged
from dartfx.passes.request import Request
from dartfx.passes.runner import Observer, PassRunner
from dartfx.passes.selection import Select
from dartfx.passes.site import Site, Vision
from dartfx.passes.transform.check_shapes import check_shapes
from dartfx.passes.transform.gather_frontier import gather_frontier
from dartfx.passes.transform.insert_selection import (
    Budget,
    RuntimeChecks,
    emit_budgets,
    insert_selection,
)
from dartfx.passes.transform.shrink_sizes import shrink_sizes
from dartfx.passes.transform.trim_kv_cache import return_whole, trim_caches

FindVision = Callable[[GraphModule], Vision]


def prune(
    module: GraphModule,
    request: Request,
    vision: FindVision | None = None,
    observe: Observer | None = None,
) -> Outcome | None:
    """Prune one normalised graph in place.

    vision: finds the vision tokens of a graph that does not hold the merge; None takes them from
    the merge in the graph.  Returns Pruned, Declined (why, where, what to try), Unchanged, or None
    when no vision tokens enter a decoder here (the graph is then unchanged).
    """
    run = PassRunner(module, observe)
    try:
        # Causal convolutions, each as one call that keeps the length of its sequence.
        fold_windows(module.graph)
        outcome = _prune(module, request, vision, run)
        unfold_windows(module.graph)
        module.recompile()
        return outcome
    except Exception as error:
        return internal_error(run.current, error)


class Located(NamedTuple):
    """Where the stages cut: a site by each layer."""

    sites: dict[int, Site]

    @property
    def site(self) -> Site:
        """The first stage's."""
        return next(iter(self.sites.values()))


class Plan(NamedTuple):
    """region: what the first cut changes; cuts: those that drop tokens, at least one;
    order_mixing: what of the region reads the order of tokens."""

    region: CutRegion
    cuts: list[PlannedCut]
    layout: CacheLayout
    order_mixing: OrderMixing | None

    @property
    def site(self) -> Site:
        """Where the first cut is made."""
        return self.region.site

    @property
    def trimmed(self) -> dict[Node, int]:
        """The caches that are as long as the pruned sequence in every layer, by layer."""
        return self.layout.caches if self.layout.layout == "uniform" else {}

    def checks(self, cut: PlannedCut, request: Request) -> RuntimeChecks:
        """What decode needs checked at run time of one cut."""
        even_rows = bool(self.trimmed) and not request.gathers_decode_mask
        return RuntimeChecks(
            even_rows=even_rows and cut is self.cuts[0],
            window=self.layout.window if cut is self.cuts[-1] else None,
        )


class CutResult(NamedTuple):
    """What was cut, the vision tokens that enter the next cut, and the caches as they are now."""

    cut: Cut
    vision: Vision
    caches: dict[Node, int]


def _prune(
    module: GraphModule, request: Request, vision: FindVision | None, run: PassRunner
) -> Outcome | None:
    # Where vision tokens enter a decoder stack, and what each cut reads there.
    located = run("locate", _locate_cuts, module, request, vision)
    if located is None:
        return None
    # Where the token axis runs, which cuts drop tokens, and which KV layout decode can read.
    plan = run("axes", _plan_cuts, located, request)
    if isinstance(plan, Unchanged):
        return plan
    layer_of, flops_before = plan.site.stack.layer_of, flops(plan.site.stack.layer_of)
    kv_bytes_before = bytes_of(plan.layout.caches)
    # N and R of every cut as arguments; windows that pruning leaves unfilled are returned whole.
    budgets = emit_budgets(plan.region, plan.cuts)
    return_whole(plan.region, plan.layout.return_whole)
    results: list[CutResult] = []
    region, caches = plan.region, plan.trimmed
    for planned, budget in zip(plan.cuts, budgets, strict=True):
        if results:
            # A later cut starts from the tokens that the one before left.
            entering, caches = results[-1].vision, results[-1].caches
            site = run("locate", locate, planned.stage.layer, entering, plan.site.stack)
            region = run("axes", CutRegion, site)
        checks = plan.checks(planned, request)
        select = planned.stage.select
        results.append(_apply_cut(region, select, budget, checks, caches, request, run))
    return Pruned(
        stack=plan.site.stack.path,
        how=plan.site.vision.how,
        batch=hint(sizes(plan.site.hidden)[0]),
        cuts=tuple(result.cut for result in results),
        kv_layout=plan.layout.layout if plan.layout.caches else "none returned",
        flops=(flops_before, flops(layer_of)),
        kv_bytes=(kv_bytes_before, bytes_of(results[-1].caches or plan.layout.caches)),
        seconds=run.timer.seconds,
        order_mixing=plan.order_mixing,
    )


def _apply_cut(
    region: CutRegion,
    select: Select,
    budget: Budget,
    checks: RuntimeChecks,
    caches: dict[Node, int],
    request: Request,
    run: PassRunner,
) -> CutResult:
    before, site = sizes(region.site.hidden)[1], region.site
    # keep_idx [B, S'] in front of layer K, the same on every rank.
    chosen = run("insert", insert_selection, region, select, budget, checks)
    # Every token-axis value that enters the region, gathered once by keep_idx.
    gather = run("gather", gather_frontier, region, chosen.keep_idx)
    crossings = tuple(_crossing(value, region.axes) for value in gather.crossed())
    # What the kept tokens become where dropped ones are averaged into them.
    if request.merge:
        run("merge", merge_dropped, region, chosen, gather)
    # Size arguments in the region that mean S become S'.
    run("shrink", shrink_sizes, region, chosen.length)
    # Under the uniform layout: caches of layers before K, as they leave the graph.
    caches = run("trim cache", trim_caches, region, caches, gather)
    # Every shape in the region is the one that axis inference predicts.
    run("check", check_shapes, region, chosen.length)
    # What a kept key counts for where attention is calibrated.
    if request.calibrate:
        run("calibrate", calibrate, region, chosen)
    counts = hint(value_of(budget.vision_tokens)), hint(value_of(budget.retain))
    sequence = hint(before), hint(value_of(chosen.length))
    cut = Cut(site.layer, *counts, sequence, crossings, chosen.across)
    entering = gather.crossed()[site.hidden]
    return CutResult(cut, Vision(entering, (chosen.vision_mask,), (), site.vision.how), caches)


def _locate_cuts(
    module: GraphModule, request: Request, vision: FindVision | None
) -> Located | None:
    """The stages' sites in the decoder stack that vision tokens enter; None where they enter none.

    Raises Refusal where any of the stages could not cut.
    """
    stacks = find_stacks(module.graph)
    if vision is None:
        found = find_vision(module.graph, stacks)
        if found is None:
            return None
        entering, stack = found
    else:
        entering = vision(module)
        stack = entered_stack(module.graph, stacks, entering.embeds)
    layers = [stage.layer for stage in request.stages]
    return Located({layer: locate(layer, entering, stack) for layer in layers})


def _plan_cuts(located: Located, request: Request) -> Plan | Unchanged:
    """What the cuts will do, before anything is changed.

    Raises Refusal for a graph that cannot be pruned, whatever its sizes.
    """
    region = CutRegion(located.site)
    tokens = vision_tokens(located.site.vision)
    cuts = plan_budgets(tokens, request, located.site.hidden.graph)
    if not cuts:
        wanted = hint(request.stages[-1].retain(tokens))
        text = f"nothing to drop: {wanted} tokens to retain of {hint(tokens)}"
        return Unchanged(text, all_retained=True)
    first, last = cuts[0], cuts[-1]
    if first.stage is not request.stages[0]:
        region = CutRegion(located.sites[first.stage.layer])
    # S' = S - N + R of the last cut, where R < N.
    length = sizes(region.site.hidden)[1] - first.vision_tokens + last.retain
    mixing = order_mixing(region, request.order_mixing)
    layout = plan_cache_layout(region, length, request)
    if request.calibrate:
        require_calibratable(region, layout, mixing, request)
    return Plan(region, cuts, layout, mixing)


def _crossing(node: Node, axes: TokenAxes) -> Crossing:
    return Crossing(node.name, tuple(map(str, sizes(node))), axes.dims(node), source_line(node))
