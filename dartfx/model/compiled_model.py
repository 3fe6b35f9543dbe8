"""A model's compiled call: in one graph or several, and what it reports of unpruned calls."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dartfx import compat
from dartfx.backend.graph_compiler import (
    NeedsGraphBreaks,
    compile_graph,
    prepare_dynamo,
)
from dartfx.backend.later_failures import cut_that_caused
from dartfx.backend.request import CallerCapabilities
from dartfx.backend.rewrite import refuse
from dartfx.config.options import DartConfig
from dartfx.model.arguments import Arguments, brings_media, leaves_of, swapped, with_decode_masks
from dartfx.model.caches import filling, kv_cache
from dartfx.model.caches.calibration import unfit
from dartfx.model.caches.weights import Weights
from dartfx.model.device_hooks import hooks_in_decoder
from dartfx.model.failures import (
    failure_after_cut,
    inner,
    not_one_graph,
    nothing_merged,
    past_limit,
    raise_ours,
    runs_eagerly,
)
from dartfx.model.history import History
from dartfx.model.tower import call_of
from dartfx.observe import folders, report
from dartfx.observe.report import Report
from dartfx.passes.refusal import Declined
from dartfx.runtime import call_budget, graph_runs, keep_idx, vision_mask
from dartfx.runtime.full_length import restore_length
from dartfx.runtime.graph_breaks import GraphBreak, broken_by, with_graph_break
from dartfx.runtime.kept_positions import mark
from dartfx.runtime.prefill.padding import crop_caches, cropped
from dartfx.runtime.prefill.prefills import Prefills
from dartfx.runtime.prefill.recorded import replaying

__all__ = ["CompiledModel"]

log = logging.getLogger(__name__)
Call = Callable[..., Any]


# Compilations of one model do not count against another's recompile_limit (torch 2.13).
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

# While one thread compiles, torch's flag for that is set in all of them, and transformers' code
# reads it.  Dynamo also compiles once more for each thread that found no code before it waited.
_COMPILING = threading.RLock()


class CompiledModel:
    """A model's compiled call: one whole graph where dynamo can make it, several where not.

    A whole graph is what ``generate`` gives for nearly every model, while a plain forward with
    pixels may have to break.  Calls that broke are remembered by the names of their arguments, and
    so are calls that failed after a pruned graph, which run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        one_graph: Call,
        with_breaks: Call,
        config: DartConfig,
        prefills: Prefills | None = None,
    ) -> None:
        self.config, self.prefills = config, prefills
        self.full_logits = False  # whether calls return logits at the prompt's length
        self.calls, self._slots, self.history, self._weights = 0, 0, History(), Weights(model)
        self._model = self.budgeted = model  # the one that dartfx.budget is given
        self._eager: Call = model._call_impl
        self._one_graph, self._with_breaks = one_graph, with_breaks
        self._breaks: dict[frozenset[str], GraphBreak | None] = {}
        self._fails: dict[frozenset[str], Declined] = {}
        self._settled: set[frozenset[str]] = set()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: DartConfig,
        dynamic: bool | None = None,
        prefills: Prefills | None = None,
    ) -> CompiledModel:
        """What ``dartfx.compile`` puts in the place of a model's call."""
        prepare_dynamo()
        caller = CallerCapabilities(
            fixes_sliding_lengths=True,
            gathers_decode_mask=True,
            knows_positions=True,
            replays_prefills=prefills is not None,
        )
        may_break = replace(caller, can_retry_with_graph_breaks=True)
        in_one = partial(compile_graph, config, caller=may_break)
        in_several = partial(compile_graph, config, caller=caller)
        call = call_of(model, config.selector)
        settings: dict[str, Any] = {"dynamic": dynamic, **_ISOLATED}
        one_graph = torch.compile(call, backend=in_one, fullgraph=True, **settings)
        with_breaks = torch.compile(call, backend=in_several, **settings)
        return cls(model, one_graph, with_breaks, config, prefills)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return self._eager(*args, **kwargs)
        # Unlike is_compiling(), this one is not set by other threads' compilations.
        if torch.compiler.is_dynamo_compiling():
            if brings_media(args, kwargs):
                return _outside_of_graphs(self, args, kwargs)
            # A decode step of a static cache, which transformers compiles by itself.
            return self._eager(*args, **kv_cache.with_traced_mask(kwargs))
        self.calls += 1
        call = Arguments.of(self._model.forward, args, kwargs)
        caches = [*call.caches, *filter(kv_cache.is_cache, vars(self._model).values())]
        declined = runs_eagerly() or hooks_in_decoder(self._model) or unfit(caches, self.config)
        if declined is not None:
            if call.media or vision_mask.given() is not None:
                with self.reporting():
                    self.refuse(declined)
            return self._eager(*args, **kwargs)
        image = bool(call.media) or vision_mask.given() is not None
        filled_later = filling.cache_to_fill(caches, call.tokens, image)
        if filled_later is not None and self.config.kv_layout != "layered":
            return self._fill(filled_later, call)
        kv_cache.require_fitting(caches, call.tokens, self._weights)
        run, pads = self._prepared(call, caches)
        before = {id(kv): kv_cache.held_before(kv) for kv in caches if call.tokens != 1}
        with keep_idx.collect_keep_idx() as collected, kv_cache.fitting_masks(caches):
            result = self._call(with_decode_masks(run, caches))
        if pads or collected:  # nothing of either in a decode step
            leaves = [value for _, value in leaves_of("", result)]
            filled = {id(kv): kv for kv in [*caches, *filter(kv_cache.is_cache, leaves)]}
            if pads:
                crop_caches(list(filled.values()), pads)
                collected[:] = [cropped(record, pads) for record in collected]
            if pads and collected:
                mark(leaves, collected[-1].keep_idx)
            for key, kv in filled.items():
                known = collected, call.pad_masks, before.get(key), self._weights
                kv_cache.mark_pruned(kv, call.tokens, *known)
            self.history.add_kept(collected)
        return restore_length(result, call.tokens) if self.full_logits else result

    def _fill(self, cache: Any, call: Arguments) -> Any:
        """The call with a dynamic cache in place of another one, which then gets its new tokens."""
        swaps: dict[int, Any] = {id(cache): (dynamic := filling.growing_copy(cache))}
        if (mask := call.named.get("attention_mask")) is not None:
            swaps[id(mask)] = filling.strip_free_slots(cache, mask, call.tokens)
        given = call.with_swaps(swaps)
        result = self(*given.args, **given.kwargs)
        self._slots = filling.copy_new_tokens(cache, dynamic, self._slots)
        return swapped(result, {id(dynamic): cache})

    def _prepared(self, call: Arguments, caches: Sequence[Any]) -> tuple[Arguments, int]:
        """A prefill as it is recorded, and how many pads it has in front."""
        apart = self.full_logits or self.config.tokens or vision_mask.given() is not None
        if self.prefills is None or apart or call.args or not call.media:
            return call, 0
        kwargs, pads = self.prefills.prepared(call.kwargs, caches)
        if kwargs is call.kwargs:
            return call, pads
        return Arguments.of(self._model.forward, (), kwargs), pads

    def _call(self, call: Arguments) -> Any:
        if not call.media and any(map(filling.is_offloaded, call.caches)):
            # transformers moves layers in streams, which would break the graph in every layer.
            return self._unpruned(call, None)
        if call.media and (unfit := filling.unfit(call.caches)) is not None:
            return self._unpruned(call, unfit)
        with (
            replaying(self.prefills.recordings if self.prefills and call.media else None),
            self.reporting() as compiled,
            vision_mask.collect_masks() as noted,
            graph_runs.collect_runs() as runs,
            call_budget.applied(self.budgeted, call.frame_lengths),
            vision_mask.text_of(self._model, call.named.get("input_ids") if call.media else None),
        ):
            result = self._run_by_kind(compiled, call)
            with broken_by(self._breaks.get(call.kind) if runs else None):
                if not any(runs) and (brought := ", ".join(call.media)):
                    self.refuse(with_graph_break(nothing_merged(brought, len(runs))))
                # A graph that merges tokens itself, or a refused one.
                elsewhere = sum(runs) > len(noted)
                if vision_mask.lost(noted, call.tokens, elsewhere):
                    lost = Declined(vision_mask.LOST, advice=vision_mask.LOST_ADVICE)
                    self.refuse(with_graph_break(lost))
        return result

    @contextmanager
    def reporting(self) -> Iterator[list[Report]]:
        """The reports made inside; they go into the model's history, too."""
        with report.collect_reports() as made:
            try:
                yield made
            finally:
                self.history.reports.extend(made)

    def refuse(self, declined: Declined) -> None:
        """Report why the whole call stays unpruned; see :func:`refuse`."""
        report.record(0, declined)
        folders.note_unpruned_call(self.config.dump, declined)
        refuse(self.config, declined)

    def _run_by_kind(self, compiled: Sequence[Report], call: Arguments) -> Any:
        """Run the call, alone among threads until calls of its kind compile nothing any more."""
        if call.kind in self._settled:
            result = self._run(compiled, call)
            if compiled:
                self._settled.discard(call.kind)
            return result
        with _COMPILING:
            result = self._run(compiled, call)
        if not compiled:
            self._settled.add(call.kind)
        return result

    def _run(self, compiled: Sequence[Report], call: Arguments) -> Any:
        if (failed_before := self._fails.get(call.kind)) is not None:
            return self._unpruned(call, failed_before)
        broken = self._breaks.get(call.kind)
        if call.kind not in self._breaks:
            try:
                return self._one_graph(*call.args, **call.kwargs)
            except compat.errors("BackendCompilerFailed") as failed:
                raise_ours(failed)
                if not isinstance(needs := inner(failed), NeedsGraphBreaks):
                    raise
                log.info("%s", needs)
            except compat.errors("FailOnRecompileLimitHit"):
                # Raised before anything ran.
                brought = ", ".join(call.media)
                return self._unpruned(call, past_limit(brought) if brought else None)
            except not_one_graph() as error:
                # Raised while tracing, before anything ran.
                log.info("not one graph for a call with %s: %s", sorted(call.kind), error)
                broken = GraphBreak.of(error)
        with broken_by(broken):
            result = self._run_in_several(compiled, call)
        # Not before: an error of the caller's (a hook that raises once) is no graph break.
        self._breaks[call.kind] = broken
        return result

    def _run_in_several(self, compiled: Sequence[Report], call: Arguments) -> Any:
        try:
            return self._with_breaks(*call.args, **call.kwargs)
        except compat.errors("BackendCompilerFailed") as failed:
            raise_ours(failed)
            raise
        except Exception as error:
            pruned = [made for made in compiled if made.pruned]
            # A cache may hold tokens of the call that failed, so it cannot run again.
            if call.caches or cut_that_caused(error, pruned) is None:
                raise
            for made in pruned:
                report.discard(made)
            declined = failure_after_cut(error)
            result = self._unpruned(call, declined)
            self._fails[call.kind] = declined
            return result

    def _unpruned(self, call: Arguments, declined: Declined | None) -> Any:
        """The uncompiled call, and why it is that."""
        if declined is not None:
            self.refuse(declined)
            graph_runs.note_run(vision=True)  # which says that all is said
        return self._eager(*call.args, **call.kwargs)


def _call_outside(compiled: CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The compiled call where another torch.compile traces the code around it."""
    return compiled(*args, **kwargs)


_outside_of_graphs: Call = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _call_outside,
    reason="dartfx.compile compiles this model's calls with vision inputs by itself, as graphs of "
    "their own: leave out fullgraph=True, or the torch.compile around the model",
)
