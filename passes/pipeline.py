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

import torch
from torch.fx import GraphModule, Node

from . import cache, check, gather, insert, locate
from .axes import Axes, TokenAxes
from .facts import (
    Crossing,
    Declined,
    NoDecoder,
    Outcome,
    Pruned,
    Refusal,
    Request,
    Site,
    Size,
    Untouched,
    Vision,
)
from .flops import bytes_of, flops
from .graph import (
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
from .shrink import reroute_sizes, shrink

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told of the graph after each pass, and of the place of the cut once it is known."""

    def __call__(self, name: str, module: GraphModule, site: Site | None = None, /) -> None: ...


class Clock:
    """Seconds per pass; also tells an observer and the log when each pass has run."""

    def __init__(self, module: GraphModule, observe: Observer | None = None) -> None:
        self.seconds: dict[str, float] = {"normalise": module.meta.get("seconds", 0.0)}
        self._module, self._observe = module, observe
        self.current = ""
        self.site: Site | None = None
        self._log("normalise")

    def _log(self, name: str) -> None:
        nodes = len(self._module.graph.nodes)
        log.debug("pass %s: %.3f s, %d nodes", name, self.seconds[name], nodes)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
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
    the merge in the graph.  Returns Pruned, Declined (why, where, what to try), Untouched, or None
    when no vision tokens enter a decoder here (the graph is then unchanged).
    """
    clock = Clock(module, observe)
    try:
        return _prune(module, request, vision, clock)
    except Exception as error:
        return internal_error(clock.current, error)


def internal_error(name: str, error: Exception) -> Declined | Untouched:
    """A bug of our own in pass ``name``, as a refusal: called while handling ``error``.

    Were it to escape, dynamo would take some kinds of error for a graph break of the model's and
    go on unpruned without a word.
    """
    if isinstance(error, NoDecoder):
        return Untouched(error.declined.because)
    if isinstance(error, Refusal):
        return error.declined
    log.debug("pass %r failed", name, exc_info=True)
    return Declined(
        f"internal error in pass {name!r}: {type(error).__name__}: {error}",
        advice="please report it with the dump of this graph (option dump=...)",
    )


def _prune(
    module: GraphModule,
    request: Request,
    vision: Callable[[GraphModule], Vision] | None,
    clock: Clock,
) -> Outcome | None:
    graph = module.graph
    with clock("locate"):
        clock.site = site = _site(module, request, vision)
        if site is None:
            return None
    with clock("axes"):
        axes = TokenAxes(Axes(graph), site)
        region = _region(module, site)
        _refuse_opaque(region, axes)
    with clock("insert"):
        output = next(n for n in graph.nodes if n.op == "output")
        emit = Emitter(_anchor(site, region[0]))
        budget = insert.plan(emit, site, request)
        if not request.always and insert.nothing_to_drop(budget):
            return _all_retained(budget)
        wanted, tails = request.kv_layout, cache.tails(site, output, axes)
        window = cache.window(tails)
        left = _tokens_left(site, budget)
        if window is not None and not bool(left >= window):
            cache.return_whole(tails, output, left, request)
            window, wanted = None, "uniform"
            region = _region(module, site)
        caches = cache.cached(site, output, axes)
        layout = cache.choose_layout(site, wanted, caches)
        before = flops(site.stack.layer_of), bytes_of(caches)
        length, tokens = hint(sizes(site.hidden)[1]), [n for n in region if n.op != "output"]
        needs = insert.Caches(uniform=bool(caches) and layout == "uniform", window=window)
        keep = insert.insert(emit, site, axes, request, budget, needs)
        kept = emit.size(keep, 1)
    with clock("gather"):
        shapes = check.expected(tokens, axes, value_of(kept))
        frontier = gather.Gatherer(axes, keep)
        gather.gather_frontier(tokens, frontier)
        crossings = tuple(_crossing(n, axes) for n in frontier.crossed())
    with clock("shrink"):
        reroute_sizes(tokens, axes, site.hidden)
        shrink(tokens, axes, kept)
    with clock("trim cache"):
        if layout == "uniform":
            cache.trim(site, output, caches, frontier)
    with clock("check"):
        check.check(graph, tokens, shapes)
        module.recompile()
    crossed = frontier.crossed()
    final = [crossed.get(n, n) if layout == "uniform" else n for n in caches]
    return Pruned(
        stack=site.stack.path,
        layer=site.layer,
        how=site.vision.how,
        batch=hint(sizes(site.hidden)[0]),
        vision_tokens=hint(value_of(budget.vision_tokens)),
        retained=hint(value_of(budget.retain)),
        sequence=(length, hint(value_of(kept))),
        kv_layout=layout if caches else "none returned",
        crossings=crossings,
        flops=(before[0], flops(site.stack.layer_of)),
        kv_bytes=(before[1], bytes_of(final)),
        seconds=clock.seconds,
    )


def _tokens_left(site: Site, budget: insert.Budget) -> Size:
    """S' = S - N + R, where R < N."""
    left: Size = sizes(site.hidden)[1] - value_of(budget.vision_tokens) + value_of(budget.retain)
    return left


def _all_retained(budget: insert.Budget) -> Untouched:
    asked, present = hint(value_of(budget.retain)), hint(value_of(budget.vision_tokens))
    return Untouched(f"nothing to drop: {asked} tokens to retain of {present}", all_retained=True)


def _site(
    module: GraphModule, request: Request, vision: Callable[[GraphModule], Vision] | None
) -> Site | None:
    stacks = locate.find_stacks(module.graph)
    if vision is None:
        found = locate.find_vision(module.graph, stacks)
        return None if found is None else locate.locate(module.graph, request.layer, *found)
    entering = vision(module)
    stack = locate.entered_stack(module.graph, stacks, entering.embeds)
    return locate.locate(module.graph, request.layer, entering, stack)


def _region(module: GraphModule, site: Site) -> list[Node]:
    """Every node after the cut, in graph order: all that the hidden states at K reach."""
    return downstream(module.graph, [u for u in site.hidden.users if u.op != "output"])


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
    found = axes.opaque(dict.fromkeys(n for n in region if n.op != "output"))
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
