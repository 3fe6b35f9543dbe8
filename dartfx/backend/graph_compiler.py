"""``torch.compile(model, backend="dart")``: options -> passes -> lowering, per dynamo graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

import dartfx.ops  # noqa: F401  registers torch.ops.dartfx
from dartfx import compat
from dartfx.backend.later_failures import note_on_errors
from dartfx.backend.lowering import lower, note_sources
from dartfx.backend.masked_graph import rewrite_with_budget, rewrite_with_mask
from dartfx.backend.request import TORCH_COMPILE, CallerCapabilities, request_of
from dartfx.backend.rewrite import refuse, rewrite
from dartfx.backend.split_checks import lower_recorded
from dartfx.backend.tracing import checks, dynamo_patch, scans
from dartfx.config.options import DartConfig
from dartfx.observe.dump import Dump
from dartfx.observe.next_step import next_step_of
from dartfx.observe.report import Report, discard, one_line, record
from dartfx.passes.analysis.prefilter import has_indexed_layers, may_merge_features
from dartfx.passes.frontend.fix_windows import fix_windows
from dartfx.passes.frontend.inline_higher_order import inline_higher_order
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.outcome import Outcome, Pruned, ReturnsMask, Unchanged
from dartfx.passes.refusal import Declined
from dartfx.passes.request import Request
from dartfx.passes.transform.return_mask import earlier_embeddings
from dartfx.runtime import vision_mask
from dartfx.runtime.call_budget import BudgetDispatcher, CallBudget, not_honoured
from dartfx.runtime.graph_breaks import with_graph_break
from dartfx.runtime.graph_runs import NotedRun, warn_at_limit
from dartfx.runtime.keep_idx import KeepIdxRecorder, return_keep_idx
from dartfx.runtime.kept_positions import ShortCaches, TakesShortened
from dartfx.runtime.mask_dispatch import MaskDispatcher, MaskProducer, compile_apart
from dartfx.runtime.rank_agreement import Ranks
from dartfx.runtime.vision_mask import LOST_ADVICE

__all__ = ["compile_graph", "dart", "prepare_dynamo"]

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def dart(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Compiled:
    """The backend that ``torch.compile(backend="dart")`` calls for each dynamo graph.

    mode, options: as given to ``torch.compile``; see :meth:`dartfx.DartConfig.of_call`.
    Raises ConfigError for an invalid option, and UnsupportedGraphError for a graph with vision
    tokens that cannot be pruned when ``on_unsupported="error"``.
    """
    return compile_graph(DartConfig.of_call(options, mode), module, inputs)


def _reset() -> None:
    # torch._dynamo.reset() calls this: Inductor's CUDA-graph trees outlive what it compiled.
    if torch.cuda.is_available() and (reset := compat.find("reset_cudagraph_trees")) is not None:
        reset()


dart.reset = _reset  # type: ignore[attr-defined]


_NO_LAYERS = (
    "vision tokens enter a tensor-parallel graph that holds no whole decoder stack (dynamo broke "
    "the graph between its layers)"
)


class NeedsGraphBreaks(Exception):
    """The whole call in one graph cannot be pruned, but its parts may be."""


def compile_graph(
    config: DartConfig,
    module: GraphModule,
    inputs: Sequence[Any],
    caller: CallerCapabilities = TORCH_COMPILE,
) -> Compiled:
    """Compile one dynamo graph: pruned where vision tokens enter a decoder, else unchanged."""
    scans.install(_calls_us)  # for later frames: dynamo may have been reset since
    graph = GraphCompiler(config, module, caller)
    graph.dump.save_inputs(inputs)
    try:
        compiled = graph.compile_merge(inputs) if may_merge_features(graph.flat.graph) else None
        compiled = compiled or graph.compile_without_merge(inputs)
        # A dispatcher records its own runs: only some of them come with a mask.
        if not isinstance(compiled, MaskDispatcher):
            compiled = NotedRun(compiled, graph.concerns_vision_tokens)
        if (caller.knows_positions or config.tokens) and not caller.can_retry_with_graph_breaks:
            compiled = TakesShortened(compiled, module.graph)
        short = not caller.gathers_decode_mask
        return ShortCaches(compiled, module.graph, graph.reported) if short else compiled
    except compat.errors("RestartAnalysis"):
        # Dynamo traces the frame again and comes back with the graph that counts.
        graph.discard_reports()
        raise


def _calls_us(backend: object) -> bool:
    """Whether dynamo's wrapping of a backend ends in :func:`compile_graph` or :func:`dart`."""
    backend = checks.unwrapped(backend)
    return getattr(backend, "func", backend) in (compile_graph, dart)


def prepare_dynamo() -> None:
    """Install what dynamo needs before it traces a frame for this backend; see tracing."""
    for part in (dynamo_patch, checks, scans):
        part.install(_calls_us)


class GraphCompiler:
    """Compiles one graph: rewrites, reports, dumps and lowers it."""

    def __init__(self, config: DartConfig, module: GraphModule, caller: CallerCapabilities) -> None:
        self.config, self.module, self.caller = config, module, caller
        checks.allow_reading(module.graph)
        note_sources(module)
        # Where nothing is pruned, dynamo's own module is compiled, with its regions.
        self.flat = module = inline_higher_order(module)
        self.nodes = len(module.graph.nodes)
        self.reported: list[Report] = []
        fix_windows(module.graph)  # now, since a guard counts only while dynamo compiles
        self.ranks = Ranks(module)
        self.across_ranks = bool(self.ranks.group)
        self.dump = Dump(config, module, dataclasses.asdict(caller))

    def compile_merge(self, inputs: Sequence[Any]) -> Compiled | None:
        """Compile a graph that may merge vision tokens; None when it turns out not to."""
        request, trace = request_of(self.config, self.caller), lambda: normalise(self.ranks.module)
        outcome, rewritten, embeds_index = rewrite(
            trace,
            self.flat,
            request,
            observe=self.dump,
            returns_mask=True,
            agree=self.ranks.agree,
        )
        if outcome is None:
            return None
        if isinstance(outcome, Pruned) and vision_mask.any_noted(inputs):
            # Tokens of another medium, merged by an earlier graph, are vision tokens of this one.
            alone = partial(self.announced_apart, outcome, rewritten, request)
            dispatcher = self.dispatcher(request, otherwise=alone)
            dispatcher.prepare(inputs)
            return dispatcher
        self.announce(outcome)
        if isinstance(outcome, Pruned):
            lower = partial(self.lower, inputs=self.ranks.inputs(inputs))
            return self.per_call(self.recorded(lower, rewritten, outcome, request))
        if isinstance(outcome, ReturnsMask) and embeds_index is not None:
            earlier = earlier_embeddings(rewritten, embeds_index)
            lowered = self.lower(rewritten, self.ranks.inputs(inputs))
            return self.ranks.wrap(MaskProducer(lowered, embeds_index, earlier))
        plain = self.lower(self.module, inputs)
        return self.per_call(plain) if getattr(outcome, "all_retained", False) else plain

    def announced_apart(self, outcome: Pruned, module: GraphModule, request: Request) -> Compiled:
        """Report a pruned graph, and compile it, when a first call needs it."""
        self.announce(outcome)
        return self.compile_apart(outcome, module, request)

    def compile_apart(self, outcome: Pruned, module: GraphModule, request: Request) -> Compiled:
        """Compile a pruned graph outside dynamo's call."""
        return self.recorded(partial(compile_apart, lower=self.lower), module, outcome, request)

    def recorded(
        self, lower: Callable[..., Compiled], module: GraphModule, outcome: Pruned, request: Request
    ) -> Compiled:
        """Compile a pruned graph, which records the tokens that each call keeps where needed."""
        wanted = self.config.tokens or self.caller.knows_positions
        wanted = wanted or outcome.needs_keep_idx(request)
        added = return_keep_idx(module, tokens=self.config.tokens) if wanted else []
        compiled = lower(module)
        run = KeepIdxRecorder(compiled, added, self.dump.note_kept) if added else compiled
        return self.ranks.wrap(run)

    def per_call(self, fixed: Compiled) -> Compiled:
        """Dispatch to ``fixed``, or to a graph that takes the budget of a call as an input."""
        return BudgetDispatcher(fixed, self.with_budget) if self.caller.knows_positions else fixed

    def request_for(self, budget: CallBudget) -> Request:
        """The request of calls that bring a budget of this kind.  Raises SelectionError."""
        if self.across_ranks:
            raise not_honoured("several ranks share it")
        return request_of(self.config, self.caller, budget)

    def with_budget(self, budget: CallBudget) -> Compiled:
        """Compile the graph with the budget as its first input.  Raises SelectionError."""
        request = self.request_for(budget)
        outcome, module, _ = rewrite_with_budget(self.flat, self.ranks, self.dump, request, budget)
        if not isinstance(outcome, Pruned):
            raise not_honoured(getattr(outcome, "because", None))
        return self.announced_apart(outcome, module, request)

    def lower(self, module: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Lower a graph, pruned or not."""
        compilation = self.reported[-1].compilation if self.reported else None
        note = self.dump.note_output_code
        compiled = partial(lower, self.config, note_output_code=note, compilation=compilation)
        wanted = self.caller.replays_prefills and not self.across_ranks
        return lower_recorded(compiled, module, inputs) if wanted else compiled(module, inputs)

    def dispatcher(
        self, request: Request, otherwise: Callable[[], Compiled] | None = None
    ) -> MaskDispatcher:
        """A callable for this graph where its vision mask comes from outside of it."""
        rewrite = partial(rewrite_with_mask, self.flat, self.ranks, self.dump)
        return MaskDispatcher(
            self.flat,
            self.module,
            request,
            announce=self.announce,
            rewrite=rewrite,
            compile_pruned=self.compile_apart,
            lower=self.lower,
            compare_ranks=self.ranks.compare,
            request_for=self.request_for if self.caller.knows_positions else None,
            otherwise=otherwise,
        )

    def compile_without_merge(self, inputs: Sequence[Any]) -> Compiled:
        """Compile a graph whose vision tokens, if any, were merged elsewhere."""
        dispatcher = self.dispatcher(request_of(self.config, self.caller))
        incoming = dispatcher.incoming(inputs)
        could_come = has_indexed_layers(self.flat.graph) and dispatcher.may_receive_masks
        if incoming is not None and not could_come and self.across_ranks:
            # All ranks exchange whether masks came, so all of them must get there.
            self.announce(Declined(_NO_LAYERS, advice=LOST_ADVICE))
            return self.lower(self.module, inputs)
        if could_come or incoming is not None:
            if incoming is None:
                self.announce(self._no_mask(dispatcher, "no vision tokens came with this call"))
            dispatcher.prepare(inputs)
            return dispatcher
        # One decoder layer on its own has no index, but takes embeddings and attends causally.
        self.announce(self._no_mask(dispatcher, "no vision tokens enter this graph"))
        return self.lower(self.module, inputs)

    def _no_mask(self, dispatcher: MaskDispatcher, otherwise: str) -> Unchanged:
        floats = dispatcher.unexplained_inputs()
        if not floats:
            return Unchanged(otherwise)
        return Unchanged(
            f"a prompt came with {', '.join(floats)} and no vision mask. If it holds vision "
            "tokens, they were merged outside of dynamo's graphs",
            unsure=True,
        )

    @property
    def concerns_vision_tokens(self) -> bool:
        """Whether a report accounts for this graph's vision tokens."""
        outcomes = (report.outcome for report in self.reported)
        return any(not isinstance(o, Unchanged) or o.all_retained for o in outcomes)

    def discard_reports(self) -> None:
        """Discard this graph's reports."""
        for report in self.reported:
            discard(report)
        self.dump.abandon("dynamo traces its frame again")

    def announce(self, outcome: Outcome) -> None:
        """Report, log and dump the graph's outcome; treat a refusal as ``on_unsupported`` says."""
        if (
            self.caller.can_retry_with_graph_breaks
            and isinstance(outcome, Declined)
            and outcome.may_retry_with_graph_breaks
        ):
            self.dump.abandon(f"compiled as several graphs instead: {outcome.because}")
            raise NeedsGraphBreaks(outcome.because)
        if isinstance(outcome, Declined) and self.caller.knows_positions:
            outcome = with_graph_break(outcome)
        report = record(self.nodes, outcome)
        self.reported.append(report)
        self.dump.finish(report)
        if isinstance(outcome, Pruned):
            note_on_errors()
            if not self.caller.knows_positions and self.config.on_unsupported != "ignore":
                warn_at_limit()
            log.info("%s", one_line(report, outcome))
        elif isinstance(outcome, Declined):
            refuse(self.config, outcome)
        else:
            news = isinstance(outcome, Unchanged) and (outcome.all_retained or outcome.unsure)
            said = f"; {next_step_of(outcome)}" if news else ""
            level = logging.WARNING if news else logging.INFO
            log.log(level, "graph %d: %s%s", report.graph, outcome.because, said)
