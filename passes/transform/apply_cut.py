"""One cut: select tokens before a decoder layer, gather what crosses, shrink what follows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from dartfx.passes.analysis.axes import Axes, TokenAxes
from dartfx.passes.distributed.sync_selection import sync_selection
from dartfx.passes.graph import (
    Emitter,
    bases,
    downstream,
    hint,
    mutated_operands,
    sizes,
    source_line,
    value_of,
    without_gradient,
)
from dartfx.passes.outcome import Crossing, Cut
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Stage
from dartfx.passes.site import Site, Vision
from dartfx.passes.transform import check_shapes, gather_frontier, insert_selection, trim_kv_cache
from dartfx.passes.transform.shrink_sizes import reroute_sizes, shrink

Step = Callable[[str], AbstractContextManager[None]]


class CutRegion:
    """Everything after a cut, in graph order, and where the token axis runs in it.

    Raises Refusal where an operator reads the token axis in a way that no rule accounts for.
    """

    def __init__(self, graph: Graph, site: Site) -> None:
        self.site = site
        self.axes = TokenAxes(Axes(graph), site)
        self.output = next(n for n in graph.nodes if n.op == "output")
        self.recompute()
        _refuse_opaque(self.tokens, self.axes)

    def recompute(self) -> None:
        """Read the graph anew, after something else became its output."""
        # All that the hidden states at K reach.
        starts = [u for u in self.site.hidden.users if u.op != "output"]
        nodes = downstream(self.site.hidden.graph, starts)
        self.tokens = [n for n in nodes if n.op != "output"]

    def emitter(self) -> Emitter:
        """Inserts in front of the cut."""
        return Emitter(_anchor(self.site, self.tokens[0]))


class CutResult(NamedTuple):
    """What was cut, the vision tokens that enter the next cut, and the caches as they are now."""

    cut: Cut
    left: Vision
    uniform: dict[Node, int]


def cut(
    module: GraphModule,
    region: CutRegion,
    stage: Stage,
    budget: insert_selection.Budget,
    needs: insert_selection.RuntimeChecks,
    uniform: dict[Node, int],
    step: Step,
) -> CutResult:
    """Make one cut in a normalised graph, in place.

    uniform: caches and their layers, of which those from before the cut are cut as they leave the
    graph.  step: opens a context for each pass.
    """
    site, axes, tokens = region.site, region.axes, region.tokens
    length = hint(sizes(site.hidden)[1])
    with step("insert"):
        emit = region.emitter()
        keep, mask = insert_selection.insert(emit, site, axes, stage.select, budget, needs)
        keep, across = sync_selection(keep, stage.select)
        left = Emitter(keep.next)(torch.ops.aten.gather.default, mask, 1, keep)
        kept = emit.size(keep, 1)
    with step("gather"):
        shapes = check_shapes.expected(tokens, axes, value_of(kept))
        frontier = gather_frontier.Gatherer(axes, keep)
        gather_frontier.gather_frontier(tokens, frontier)
        crossings = tuple(_crossing(n, axes) for n in frontier.crossed())
    with step("shrink"):
        reroute_sizes(tokens, axes, site.hidden)
        shrink(tokens, axes, kept)
    with step("trim cache"):
        uniform = trim_kv_cache.trim(site, region.output, uniform, frontier)
    with step("check"):
        check_shapes.check(module.graph, tokens, shapes)
        module.recompile()
    counts = hint(value_of(budget.vision_tokens)), hint(value_of(budget.retain))
    what = Cut(site.layer, *counts, (length, hint(value_of(kept))), crossings, across)
    entering = frontier.crossed()[site.hidden]
    return CutResult(what, Vision(entering, (left,), (), site.vision.how), uniform)


def _anchor(site: Site, first: Node) -> Node:
    """Where to select: before ``first``, outside of what it turned on or off for itself."""
    off: Node | None = None
    casting: dict[object, Node] = {}
    node = site.hidden
    while node is not first:
        off = without_gradient(node, off)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            casting[node] = node
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            casting.pop(node.args[0], None)
        node = node.next
    order = {n: i for i, n in enumerate(first.graph.nodes)}
    return min([first, *casting.values(), *([off] if off else [])], key=order.__getitem__)


def _refuse_opaque(region: list[Node], axes: TokenAxes) -> None:
    # A dict keeps the order and answers what is inside quickly.
    found = axes.opaque(dict.fromkeys(region))
    if found is not None:
        node, operand = found
        if any(base not in region for w in mutated_operands(node) for base in bases(w)):
            raise Refusal(
                "a decoder layer after the cut writes its keys and values into a cache made "
                "beforehand: the cache is static",
                node,
                advice="the default DynamicCache",
            )
        raise Refusal(
            f"{node.target} reads the token axis of {operand} in a way that dropping tokens "
            "would change, or that no rule describes",
            node,
            advice="please report the operator; meanwhile this model runs unpruned",
        )


def _crossing(node: Node, axes: TokenAxes) -> Crossing:
    return Crossing(node.name, tuple(map(str, sizes(node))), axes.dims(node), source_line(node))
