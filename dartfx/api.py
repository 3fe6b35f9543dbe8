"""``dartfx.compile``, ``dartfx.explain`` and ``dartfx.reset``: the backend made easy to use."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

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

from dartfx import report, vision
from dartfx.backend import Host, NeedsGraphBreaks, compile_graph, refuse
from dartfx.config import DartConfig
from dartfx.passes.facts import Declined, HandsOn, Untouched
from dartfx.report import Report

__all__ = ["Explanation", "compile", "explain", "reset"]

log = logging.getLogger(__name__)

# What dynamo raises when fullgraph=True cannot hold; it lets some of the tracer's own errors out.
_NOT_ONE_GRAPH = (
    TorchDynamoException,
    FailOnRecompileLimitHit,
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)

Module = TypeVar("Module", bound=nn.Module)
Call = Callable[..., Any]


class Forward:
    """A model's compiled call: one whole graph where dynamo can make it, several where not.

    A whole graph is what ``generate`` gives for nearly every model, while a plain forward with
    pixels may have to break.  Which calls broke is remembered by the arguments they passed.
    """

    def __init__(self, whole: Call, broken: Call, config: DartConfig) -> None:
        self.config = config
        self.calls = 0
        self._whole, self._broken = whole, broken
        self._breaks: set[frozenset[str]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        with report.watching() as compiled, vision.noting() as noted:
            result = self._run(args, kwargs)
        recount(getattr(result, "past_key_values", None) or kwargs.get("past_key_values"))
        if compiled and not any(map(_tells, compiled)):
            self._tell_unpruned(len(compiled), args, kwargs)
        lost = [found for found in noted if not found.taken.is_set()]
        if lost:
            for found in lost:
                found.taken.set()  # said here, so not once more when its tensor dies
            self.refuse(Declined(vision.LOST, advice=vision.LOST_ADVICE))
        return result

    def refuse(self, declined: Declined) -> None:
        """Report something of the whole call that stays unpruned; see :func:`refuse`."""
        report.record(0, declined)
        refuse(self.config, declined)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = frozenset(k for k, v in kwargs.items() if v is not None)
        if passed not in self._breaks:
            try:
                return self._whole(*args, **kwargs)
            except BackendCompilerFailed as failed:
                if not isinstance(failed.inner_exception, NeedsGraphBreaks):
                    raise
                log.info("%s", failed.inner_exception)
                self._breaks.add(passed)
            except _NOT_ONE_GRAPH as error:
                # Raised while tracing, before anything ran.
                log.info("not one graph for a call with %s: %s", sorted(passed), error)
                self._breaks.add(passed)
        return self._broken(*args, **kwargs)

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


# Floating tensors that are never vision features.
_NO_MEDIA = {"attention_mask", "past_key_values"}


def _tells(made: Report) -> bool:
    """Whether a report says what became of a graph's vision tokens."""
    outcome = made.outcome
    return not isinstance(outcome, Untouched) or outcome.all_retained


def _holds_floats(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    parts = value.values() if isinstance(value, Mapping) else value
    nested = depth > 0 and isinstance(value, Mapping | list | tuple)
    return nested and any(_holds_floats(part, depth - 1) for part in parts)


def compile(
    model: Module, *, mode: str | None = None, dynamic: bool | None = None, **options: object
) -> Module:
    """Compile ``model`` in place with the dart backend, for its calls and for ``generate``.

    mode, dynamic: as in ``torch.compile``; options: those of :class:`DartConfig`.  Uses one graph
    for the whole model where dynamo can trace it and falls back to several where not.  Hooks that
    transformers would install during the first call are installed now, since installing them
    breaks the graph.  Returns ``model``.  Raises ConfigError for an invalid option, TypeError for
    anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.compile needs a torch.nn.Module, got {type(model).__name__}")
    config = DartConfig.from_options(options, mode)
    _install_capturing_hooks(model)
    model._compiled_call_impl = forward = _forward(model, config, dynamic)
    _watch_generate(model, forward)
    return model


def _forward(model: nn.Module, config: DartConfig, dynamic: bool | None = None) -> Forward:
    in_one = partial(compile_graph, config, host=Host(may_break=True, recounts=True))
    in_several = partial(compile_graph, config, host=Host(recounts=True))
    whole = torch.compile(model._call_impl, backend=in_one, dynamic=dynamic, fullgraph=True)
    broken = torch.compile(model._call_impl, backend=in_several, dynamic=dynamic)
    return Forward(whole, broken, config)


def recount(cache: Any) -> None:
    """Set the token counts of a transformers cache's sliding layers to what pruning left of them.

    Such a layer counts in Python, so the compiled prefill counted the tokens of the whole prompt.
    """
    for layer in getattr(cache, "layers", ()):
        if not getattr(layer, "is_sliding", False) or not isinstance(layer.keys, torch.Tensor):
            continue
        counted = getattr(layer, "cumulative_length", None)
        held = layer.keys.shape[-2]
        if isinstance(counted, int) and held < min(counted, layer.sliding_window - 1):
            layer.cumulative_length = held


def _watch_generate(model: nn.Module, forward: Forward) -> None:
    """Let a ``generate`` of the model's own say when it never called what was compiled."""
    own = getattr(type(model), "generate", None)
    transformers = sys.modules.get("transformers")
    if transformers is None or own is None or own is transformers.GenerationMixin.generate:
        return

    @wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        before = forward.calls
        result = own(model, *args, **kwargs)
        if forward.calls == before:
            declined = Declined(
                f"{type(model).__name__}.generate runs a model inside this one and never calls "
                "what was compiled",
                advice="dartfx.compile that inner model, and say where its vision tokens are with "
                "dartfx.vision_tokens",
            )
            forward.refuse(declined)
        return result

    model.generate = generate  # type: ignore[assignment]


def _install_capturing_hooks(model: nn.Module) -> None:
    """What transformers does lazily inside the first forward, under a lock dynamo cannot trace."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    # Installing on a model installs on every model inside, once more where that was done before.
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            getattr(inner, "_output_capturing_hooks_installed", False) for inner in module.modules()
        ):
            maybe_install_capturing_hooks(module)


@dataclass(frozen=True)
class Explanation:
    """What the backend would do with each graph of one call; prints as text."""

    reports: tuple[Report, ...]

    @property
    def pruned(self) -> bool:
        """Whether any graph would be pruned."""
        return any(r.pruned for r in self.reports)

    def __str__(self) -> str:
        told = [r for r in self.reports if r.pruned or isinstance(r.outcome, Declined | HandsOn)]
        quiet = len(self.reports) - len(told)
        lines = [str(r) for r in told]
        if quiet:
            lines.append(f"{quiet} other graphs: no vision tokens enter a decoder there")
        if not self.reports:
            lines.append("dynamo made no graph of this call, so nothing can be pruned")
        elif not told:
            lines.append("nothing to prune: this call carries no vision tokens")
        return "\n".join(lines)


def explain(
    target: nn.Module | Call,
    *args: Any,
    options: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What would be pruned, and why or why not, for one call; compiles nothing.

    target: a model, or its bound ``generate``; it is called with args and kwargs, its graphs run
    eagerly.  options: as in ``torch.compile``; default: those the model was compiled with by
    :func:`dartfx.compile`, else the defaults.  Raises what the call raises; TypeError when target
    belongs to no module.
    """
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target)  # what torch.compile(model) wraps
    owner = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise TypeError("dartfx.explain needs a model or a method of one, such as model.generate")
    current = owner._compiled_call_impl
    config = current.config if isinstance(current, Forward) else DartConfig()
    if options is not None:
        config = DartConfig.from_options(options)
    config = dataclasses.replace(
        config, lowering="eager", inductor={}, mode=None, on_unsupported="ignore"
    )
    with report.collecting() as collected, _many_compilations():
        if isinstance(current, Forward):
            owner._compiled_call_impl = _forward(owner, config)
        else:
            broken = torch.compile(owner._call_impl, backend=partial(compile_graph, config))
            owner._compiled_call_impl = Forward(broken, broken, config)
        try:
            with torch.no_grad():
                target(*args, **kwargs)
        finally:
            owner._compiled_call_impl = current
    return Explanation(tuple(collected))


@contextmanager
def _many_compilations() -> Iterator[None]:
    # Every explanation compiles the same code once more; that is not a storm of recompilations.
    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def reset() -> None:
    """Forget all reports and noted vision masks.  Compiled code stays: see torch._dynamo.reset."""
    report.clear()
    vision.forget()
