"""A model's compiled call: in one graph or several, and what it reports of unpruned calls."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dartfx import compat
from dartfx.backend.graph_compiler import (
    NeedsGraphBreaks,
    compile_graph,
    prepare_dynamo,
    refuse,
)
from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.errors import DartfxError
from dartfx.model import kv_cache
from dartfx.model.device_hooks import hooks_in_decoder
from dartfx.model.history import History
from dartfx.observe import report
from dartfx.observe.report import Report
from dartfx.passes.outcome import Pruned, Unchanged
from dartfx.passes.refusal import Declined
from dartfx.runtime import keep_idx, vision_mask

__all__ = ["CompiledModel", "not_one_graph"]

log = logging.getLogger(__name__)

Call = Callable[..., Any]


def not_one_graph() -> tuple[type[Exception], ...]:
    """What dynamo raises when fullgraph=True fails; some are the tracer's, which it lets out."""
    return GuardOnDataDependentSymNode, *compat.errors(
        "TorchDynamoException",
        "FailOnRecompileLimitHit",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
    )


class CompiledModel:
    """A model's compiled call: one whole graph where dynamo can make it, several where not.

    A whole graph is what ``generate`` gives for nearly every model, while a plain forward with
    pixels may have to break.  Calls that broke are remembered by the names of their arguments, and
    so are calls that failed after a pruned graph, which run eagerly.

    uniform: compiles the same with uniform caches, for prefills into a static cache; None where the
    options forbid it.
    """

    def __init__(
        self,
        one_graph: Call,
        with_breaks: Call,
        eager: Call,
        config: DartConfig,
        uniform: Callable[[], CompiledModel] | None = None,
    ) -> None:
        self.config = config
        self.calls, self.history = 0, History()
        self._one_graph, self._with_breaks, self._eager = one_graph, with_breaks, eager
        self._uniform = None if uniform is None else cache(uniform)
        self._breaks: set[frozenset[str]] = set()
        self._fails: dict[frozenset[str], Declined] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: DartConfig,
        dynamic: bool | None = None,
        *,
        gathers_decode_mask: bool = True,
    ) -> CompiledModel:
        """What ``dartfx.compile`` puts in the place of a model's call.

        gathers_decode_mask: decode steps come through this call, too; those of static caches may be
        compiled elsewhere.
        """
        prepare_dynamo()
        caller = CallerCapabilities(
            fixes_sliding_lengths=True, gathers_decode_mask=gathers_decode_mask
        )
        retrying = replace(caller, can_retry_with_graph_breaks=True)
        in_one = partial(compile_graph, config, caller=retrying)
        in_several = partial(compile_graph, config, caller=caller)
        call = model._call_impl
        one_graph = torch.compile(call, backend=in_one, dynamic=dynamic, fullgraph=True)
        with_breaks = torch.compile(call, backend=in_several, dynamic=dynamic)
        uniform = None
        if config.kv_layout != "layered":
            one_length = replace(config, kv_layout="uniform")
            uniform = partial(cls.of, model, one_length, dynamic, gathers_decode_mask=False)
        return cls(one_graph, with_breaks, call, config, uniform)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # transformers compiles the decode steps of static caches by itself.
            return self._eager(*args, **kwargs)
        self.calls += 1
        tokens, kv = kv_cache.new_tokens(kwargs), kwargs.get("past_key_values")
        kv_cache.require_unpruned(kv, tokens)
        as_tuple = kwargs.get("return_dict") is False
        if self._uniform is not None and not as_tuple and kv_cache.is_empty_static(kv):
            uniform = self._uniform()
            uniform.history = self.history
            return uniform._prefill_static(kv, args, kwargs)
        kwargs = kv_cache.gather_decode_mask(kv, kwargs)
        with keep_idx.collect_keep_idx() as collected:
            result = self._call(args, kwargs)
        kv = getattr(result, "past_key_values", None) or kv
        kv_cache.fix_sliding_lengths(kv)
        kv_cache.mark_pruned(kv, tokens, [record.keep_idx for record in collected])
        self.history.add_kept(collected)
        return result

    def _prefill_static(self, static: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call with a dynamic cache instead of an empty static one, which gets its tokens."""
        dynamic = {"past_key_values": kv_cache.new_dynamic_cache()}
        if "attention_mask" in kwargs:
            dynamic["attention_mask"] = kv_cache.strip_static_slots(kwargs["attention_mask"])
        result = self(*args, **kwargs | dynamic)
        kv_cache.copy_into_static(static, result.past_key_values)
        result.past_key_values = static
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.reporting() as compiled, vision_mask.collect_masks() as noted:
            if (hooks := hooks_in_decoder(self._eager)) is not None:
                if _vision_inputs(args, kwargs) or vision_mask.given() is not None:
                    self.refuse(hooks)
                return self._eager(*args, **kwargs)
            result = self._run(compiled, args, kwargs)
            if compiled and not any(map(_concerns_vision_tokens, compiled)):
                self._refuse_unmerged_inputs(len(compiled), args, kwargs)
            lost = [mask for mask in noted if not mask.consumed.is_set()]
            if lost:
                for mask in lost:
                    mask.consumed.set()  # refused here, so no second warning when its tensor dies
                self.refuse(Declined(vision_mask.LOST, advice=vision_mask.LOST_ADVICE))
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
        """Report something of the whole call that stays unpruned; see :func:`refuse`."""
        report.record(0, declined)
        refuse(self.config, declined)

    def _run(
        self, compiled: Sequence[Report], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        names = frozenset(k for k, v in kwargs.items() if v is not None)
        if (failed_before := self._fails.get(names)) is not None:
            self.refuse(failed_before)
            return self._eager(*args, **kwargs)
        if names not in self._breaks:
            try:
                return self._one_graph(*args, **kwargs)
            except compat.errors("BackendCompilerFailed") as failed:
                _raise_dartfx_error(failed)
                if not isinstance(needs := _inner(failed), NeedsGraphBreaks):
                    raise
                log.info("%s", needs)
                self._breaks.add(names)
            except not_one_graph() as error:
                # Raised while tracing, before anything ran.
                log.info("not one graph for a call with %s: %s", sorted(names), error)
                self._breaks.add(names)
        try:
            return self._with_breaks(*args, **kwargs)
        except DartfxError:
            raise
        except compat.errors("BackendCompilerFailed") as failed:
            _raise_dartfx_error(failed)
            raise
        except Exception as error:
            pruned = [made for made in compiled if made.pruned]
            # A cache may hold tokens of the call that failed, so it cannot run again.
            if kwargs.get("past_key_values") is not None or not _caused_by_cut(error, pruned):
                raise
            for made in pruned:
                report.discard(made)
            self._fails[names] = _failure_after_cut(error)
            self.refuse(self._fails[names])
            return self._eager(*args, **kwargs)

    def _refuse_unmerged_inputs(
        self, graphs: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse where the call has vision inputs that none of its graphs merges."""
        if inputs := _vision_inputs(args, kwargs):
            declined = Declined(
                f"the call was given {', '.join(inputs)}, but none of its {graphs} graphs merges "
                "vision features into a decoder's embeddings: that happens in code which dynamo "
                "leaves to Python, or they enter by an encoder or by cross-attention",
                advice="dartfx.vision_tokens(mask) around the call, if the decoder's own sequence "
                "holds vision tokens",
            )
            self.refuse(declined)


def _inner(failed: Exception) -> Exception | None:
    """What a backend raised, which dynamo wraps."""
    return getattr(failed, "inner_exception", None)


def _raise_dartfx_error(failed: Exception) -> None:
    """Raise an error of dartfx out of dynamo's wrapping."""
    if isinstance(error := _inner(failed), DartfxError):
        raise error from failed


def _caused_by_cut(error: Exception, pruned: Sequence[Report]) -> bool:
    """Whether code behind a pruned graph failed on the shorter sequence.

    torch says so in errors about shapes and indices, which name the length S' that it met, or a
    number of rows made of it.  Anything else (no memory, a hook's own bug) is the caller's.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if not isinstance(error, RuntimeError | ValueError | IndexError):
        return False
    named = {int(number) for number in re.findall(r"\d+", str(error))}
    for outcome in (made.outcome for made in pruned):
        assert isinstance(outcome, Pruned)
        length = outcome.sequence[1]
        if named & {rows * n for rows in (1, outcome.batch) for n in (length, length - 1)}:
            return True
    return False


def _failure_after_cut(error: Exception) -> Declined:
    """A refusal for code between graphs, or in a later one, that needs the prompt's length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Dynamo wraps the operator's message and appends where the user's code called it.
    message = next((line for line in lines if " got " in line), lines[0] if lines else repr(error))
    files = [line for line in lines if line.startswith("File ")]
    return Declined(
        "the call has several graphs, one was pruned, and the code after it failed on the shorter "
        f"sequence: {message.rpartition(' got ')[2]}",
        where=files[-1] if files else "",
        advice="give inputs_embeds that you merged, within dartfx.vision_tokens(mask), so that one "
        "graph holds the whole call; or compute what failed (a loss, say) outside the model",
    )


# Floating tensors that are never vision features.
_NO_MEDIA = {"attention_mask", "past_key_values"}


def _vision_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The arguments of a call that may bring vision features."""
    inputs = [f"argument {i}" for i, value in enumerate(args) if _has_floats(value)]
    return inputs + sorted(k for k, v in kwargs.items() if k not in _NO_MEDIA and _has_floats(v))


def _concerns_vision_tokens(made: Report) -> bool:
    """Whether a report says what became of a graph's vision tokens."""
    outcome = made.outcome
    return not isinstance(outcome, Unchanged) or outcome.all_retained


def _has_floats(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    parts = value.values() if isinstance(value, Mapping) else value
    nested = depth > 0 and isinstance(value, Mapping | list | tuple)
    return nested and any(_has_floats(part, depth - 1) for part in parts)
