"""A model's compiled call: which lane it takes, and what is told of calls that stay unpruned."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
)
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dartfx.backend.graph_compiler import NeedsGraphBreaks, compile_graph, prepare_dynamo, refuse
from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.errors import DartfxError
from dartfx.model import kv_cache
from dartfx.observe import report
from dartfx.observe.report import Report
from dartfx.passes.outcome import Unchanged
from dartfx.passes.refusal import Declined
from dartfx.runtime import keep_idx, vision_mask

__all__ = ["NOT_ONE_GRAPH", "Forward", "compiled_forward", "watch_generate"]

log = logging.getLogger(__name__)

Call = Callable[..., Any]

# What dynamo raises when fullgraph=True cannot hold; it lets some of the tracer's own errors out.
NOT_ONE_GRAPH = (
    TorchDynamoException,
    FailOnRecompileLimitHit,
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


class Forward:
    """A model's compiled call: one whole graph where dynamo can make it, several where not.

    A whole graph is what ``generate`` gives for nearly every model, while a plain forward with
    pixels may have to break.  Which calls broke is remembered by the arguments they passed, and so
    are calls that failed after a pruned graph, which run eagerly.

    uniform: makes the same with uniform caches, for prefills into a static cache; None where the
    options forbid it.
    """

    def __init__(
        self,
        whole: Call,
        broken: Call,
        eager: Call,
        config: DartConfig,
        uniform: Callable[[], Forward] | None = None,
    ) -> None:
        self.config = config
        self._uniform = None if uniform is None else cache(uniform)
        self.calls = 0
        self._whole, self._broken, self._eager = whole, broken, eager
        self._breaks: set[frozenset[str]] = set()
        self._fails: set[frozenset[str]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # transformers compiles the decode steps of static caches by itself.
            return self._eager(*args, **kwargs)
        self.calls += 1
        given, held = kv_cache.tokens_given(kwargs), kwargs.get("past_key_values")
        kv_cache.require_unpruned(held, given)
        as_tuple = kwargs.get("return_dict") is False
        if self._uniform is not None and not as_tuple and kv_cache.empty_static(held):
            return self._uniform()._fill(held, args, kwargs)
        kwargs = kv_cache.with_kept_columns(held, kwargs)
        with keep_idx.collect_keep_idx() as handed:
            result = self._call(args, kwargs)
        held = getattr(result, "past_key_values", None) or held
        kv_cache.recount(held)
        kv_cache.note_pruned(held, given, handed)
        return result

    def _fill(self, static: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call with an empty static cache, which gets what a growing one was given."""
        fitting = {"past_key_values": kv_cache.growing()}
        if "attention_mask" in kwargs:
            fitting["attention_mask"] = kv_cache.without_room(kwargs["attention_mask"])
        result = self(*args, **kwargs | fitting)
        kv_cache.fill(static, result.past_key_values)
        result.past_key_values = static
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with report.watching() as compiled, vision_mask.collect_masks() as noted:
            result = self._run(compiled, args, kwargs)
        if compiled and not any(map(_tells, compiled)):
            self._tell_unpruned(len(compiled), args, kwargs)
        lost = [found for found in noted if not found.consumed.is_set()]
        if lost:
            for found in lost:
                found.consumed.set()  # said here, so not once more when its tensor dies
            self.refuse(Declined(vision_mask.LOST, advice=vision_mask.LOST_ADVICE))
        return result

    def refuse(self, declined: Declined) -> None:
        """Report something of the whole call that stays unpruned; see :func:`refuse`."""
        report.record(0, declined)
        refuse(self.config, declined)

    def _run(
        self, compiled: Sequence[Report], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        passed = frozenset(k for k, v in kwargs.items() if v is not None)
        if passed in self._fails:
            return self._eager(*args, **kwargs)
        if passed not in self._breaks:
            try:
                return self._whole(*args, **kwargs)
            except BackendCompilerFailed as failed:
                _raise_ours(failed)
                if not isinstance(failed.inner_exception, NeedsGraphBreaks):
                    raise
                log.info("%s", failed.inner_exception)
                self._breaks.add(passed)
            except NOT_ONE_GRAPH as error:
                # Raised while tracing, before anything ran.
                log.info("not one graph for a call with %s: %s", sorted(passed), error)
                self._breaks.add(passed)
        try:
            return self._broken(*args, **kwargs)
        except DartfxError:
            raise
        except BackendCompilerFailed as failed:
            _raise_ours(failed)
            raise
        except Exception as error:
            pruned = [made for made in compiled if made.pruned]
            # A cache may hold tokens of the call that failed, so it cannot run once more.
            if not pruned or kwargs.get("past_key_values") is not None:
                raise
            for made in pruned:
                report.discard(made)
            self.refuse(_failed_shortened(error))
            self._fails.add(passed)
            return self._eager(*args, **kwargs)

    def _tell_unpruned(self, graphs: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse where vision inputs were given, yet no graph has anything to do with them."""
        given = [f"argument {i}" for i, value in enumerate(args) if _holds_floats(value)]
        given += sorted(k for k, v in kwargs.items() if k not in _NO_MEDIA and _holds_floats(v))
        if given:
            declined = Declined(
                f"the call was given {', '.join(given)}, but none of its {graphs} graphs merges "
                "vision features into a decoder's embeddings: that happens in code which dynamo "
                "leaves to Python, or they enter by an encoder or by cross-attention",
                advice="dartfx.vision_tokens(mask) around the call, if the decoder's own sequence "
                "holds vision tokens",
            )
            self.refuse(declined)


def _raise_ours(failed: BackendCompilerFailed) -> None:
    """Raise an error of dartfx's own out of dynamo's wrapping."""
    if isinstance(failed.inner_exception, DartfxError):
        raise failed.inner_exception from failed


def _failed_shortened(error: Exception) -> Declined:
    """A refusal for code between graphs, or in a later one, that needs the prompt's length."""
    told = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Dynamo wraps what the operator said and appends where the user's code called it.
    said = next((line for line in told if " got " in line), told[0] if told else repr(error))
    lines = [line for line in told if line.startswith("File ")]
    return Declined(
        "the call has several graphs, one was pruned, and the code after it failed on the shorter "
        f"sequence: {said.rpartition(' got ')[2]}",
        where=lines[-1] if lines else "",
        advice="give inputs_embeds that you merged, within dartfx.vision_tokens(mask), so that one "
        "graph holds the whole call; or compute what failed (a loss, say) outside the model",
    )


# Floating tensors that are never vision features.
_NO_MEDIA = {"attention_mask", "past_key_values"}


def _tells(made: Report) -> bool:
    """Whether a report says what became of a graph's vision tokens."""
    outcome = made.outcome
    return not isinstance(outcome, Unchanged) or outcome.all_retained


def _holds_floats(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    parts = value.values() if isinstance(value, Mapping) else value
    nested = depth > 0 and isinstance(value, Mapping | list | tuple)
    return nested and any(_holds_floats(part, depth - 1) for part in parts)


def compiled_forward(
    model: nn.Module,
    config: DartConfig,
    dynamic: bool | None = None,
    *,
    gathers_decode_mask: bool = True,
) -> Forward:
    """What ``dartfx.compile`` puts in place of a model's call.

    gathers_decode_mask: decode steps come through it, too; those of static caches may be
    compiled elsewhere.
    """
    prepare_dynamo()
    caller = CallerCapabilities(fixes_sliding_lengths=True, gathers_decode_mask=gathers_decode_mask)
    in_one = partial(
        compile_graph, config, caller=replace(caller, can_retry_with_graph_breaks=True)
    )
    in_several = partial(compile_graph, config, caller=caller)
    whole = torch.compile(model._call_impl, backend=in_one, dynamic=dynamic, fullgraph=True)
    broken = torch.compile(model._call_impl, backend=in_several, dynamic=dynamic)
    uniform = None
    if config.kv_layout != "layered":
        one_length = replace(config, kv_layout="uniform")
        uniform = partial(compiled_forward, model, one_length, dynamic, gathers_decode_mask=False)
    return Forward(whole, broken, model._call_impl, config, uniform)


def watch_generate(model: nn.Module, forward: Forward) -> None:
    """Let a ``generate`` of the model's own say when it never called what was compiled."""
    own = getattr(type(model), "generate", None)
    transformers = sys.modules.get("transformers")
    if transformers is None or own is None or own is transformers.GenerationMixin.generate:
        return

    @wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        before = forward.calls
        result = own(model, *args, **kwargs)
        if model._compiled_call_impl is forward and forward.calls == before:
            declined = Declined(
                f"{type(model).__name__}.generate runs a model inside this one and never calls "
                "what was compiled",
                advice="dartfx.compile that inner model, and say where its vision tokens are with "
                "dartfx.vision_tokens",
            )
            forward.refuse(declined)
        return result

    model.generate = generate  # type: ignore[assignment]
