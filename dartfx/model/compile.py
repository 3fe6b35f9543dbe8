"""``dartfx.compile``, ``dartfx.explain`` and ``dartfx.reset``: the backend made easy to use."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from dartfx.backend.graph_compiler import compile_graph, prepare_dynamo
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from dartfx.model.compiled_model import Forward, compiled_forward, watch_generate
from dartfx.observe import report
from dartfx.observe.report import Report
from dartfx.passes.outcome import Outcome, Unchanged
from dartfx.runtime import keep_idx, vision_mask
from dartfx.token_map.infer_layout import Untold
from dartfx.token_map.kept_tokens import KeptTokens, kept_tokens

__all__ = ["Explanation", "compile", "explain", "reset"]

Module = TypeVar("Module", bound=nn.Module)
Call = Callable[..., Any]


def compile(
    model: Module,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    decode: Literal["static"] | None = None,
    **options: object,
) -> Module:
    """Compile ``model`` in place with the dart backend, for its calls and for ``generate``.

    mode, dynamic: as in ``torch.compile``; options: those of :class:`DartConfig`.  Uses one graph
    for the whole model where dynamo can trace it and falls back to several where not.  Hooks that
    transformers would install during the first call are installed now, since installing them
    breaks the graph.  decode: "static" makes ``generate`` use a static cache by default, so that
    decode steps share one graph (on CUDA, transformers puts them into CUDA graphs).

    Returns ``model``.  Raises ConfigError for an invalid option or a decode that the model does not
    have, TypeError for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.compile needs a torch.nn.Module, got {type(model).__name__}")
    config = DartConfig.from_options(options, mode)
    if decode is not None:
        _decode_static(model, decode, config)
    _install_capturing_hooks(model)
    model._compiled_call_impl = forward = compiled_forward(model, config, dynamic)
    watch_generate(model, forward)
    return model


def _decode_static(model: nn.Module, decode: object, config: DartConfig) -> None:
    if decode != "static":
        raise ConfigError(f'decode is {decode!r}; it can be "static" or None')
    if config.kv_layout == "layered":
        raise ConfigError(
            'decode="static" needs as many tokens in the caches of all layers, and '
            'kv_layout="layered" leaves two lengths; try kv_layout="uniform" or "auto"'
        )
    settings = getattr(model, "generation_config", None)
    if settings is None:
        raise ConfigError(
            f'decode="static" sets model.generation_config, and {type(model).__name__} has none'
        )
    settings.cache_implementation = "static"


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
    """What the backend would do with each graph of one call; prints as text.

    tokens: which vision tokens the call kept, per image, where that was asked for.  notes: what the
    way of calling changes.
    """

    reports: tuple[Report, ...]
    tokens: tuple[KeptTokens, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> bool:
        """Whether any graph would be pruned."""
        return any(r.pruned for r in self.reports)

    def __str__(self) -> str:
        told = [r for r in self.reports if _is_worth_telling(r.outcome)]
        quiet = len(self.reports) - len(told)
        lines = [str(r) for r in told]
        if quiet:
            lines.append(f"{quiet} other graphs: no vision tokens enter a decoder there")
        if not self.reports:
            lines.append("dynamo made no graph of this call, so nothing can be pruned")
        elif not told:
            lines.append("nothing to prune: this call carries no vision tokens")
        return "\n".join([*lines, *map(str, self.tokens), *self.notes])


def _is_worth_telling(outcome: Outcome) -> bool:
    """Whether a graph had to do with vision tokens, or may have had."""
    if isinstance(outcome, Unchanged):
        return outcome.all_retained or outcome.unsure
    return True


def explain(
    target: nn.Module | Call,
    *args: Any,
    options: Mapping[str, object] | None = None,
    tokens: bool = False,
    **kwargs: Any,
) -> Explanation:
    """What would be pruned, and why or why not, for one call; compiles nothing.

    target: a model, or its bound ``generate``; it is called with args and kwargs, its graphs run
    eagerly.  options: as in ``torch.compile``; default: those the model was compiled with by
    :func:`dartfx.compile`, else the defaults.  tokens: also tell which vision tokens are kept, and
    where in the image as far as kwargs tell (:mod:`dartfx.token_map.infer_layout`).
    Raises what the call raises; TypeError when target belongs to no module.
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
        config, lowering="eager", inductor={}, mode=None, on_unsupported="ignore", tokens=tokens
    )
    with report.collecting() as collected, _many_compilations():
        if isinstance(current, Forward):
            owner._compiled_call_impl = compiled_forward(owner, config)
        else:
            prepare_dynamo()
            broken = torch.compile(owner._call_impl, backend=partial(compile_graph, config))
            owner._compiled_call_impl = Forward(broken, broken, owner._call_impl, config)
        try:
            with torch.no_grad():
                target(*args, **kwargs)
        finally:
            owner._compiled_call_impl = current
    pruned = any(made.pruned for made in collected)
    shown, notes = _shown(kwargs) if tokens and pruned else ((), [])
    if current is None and _is_bypassed(owner, target):
        notes.append(_BYPASSED)
    return Explanation(tuple(collected), shown, tuple(notes))


def _shown(arguments: Mapping[str, Any]) -> tuple[tuple[KeptTokens, ...], list[str]]:
    """The kept tokens, laid out as the call's arguments tell; and a note where they do not."""
    try:
        return tuple(kept_tokens(arguments)), []
    except Untold:
        return tuple(kept_tokens()), []
    except ValueError as error:
        # A square number of tokens may still be tiles: better no place than a wrong one.
        unplaced = (dataclasses.replace(k, layout=None) for k in kept_tokens())
        return tuple(unplaced), [f"NOTE: {error}"]


_BYPASSED = (
    "NOTE: torch.compile(model) returned a wrapper of this model; any method of that wrapper but "
    "a call, generate too, runs the original model, uncompiled. Compile in place: "
    "dartfx.compile(model), or model.compile(backend='dart')"
)


def _is_bypassed(model: nn.Module, target: object) -> bool:
    """Whether a method was asked about whose model is compiled, but only by a wrapper."""
    if target is model:
        return False
    return any(
        type(found) is OptimizedModule and found._orig_mod is model for found in gc.get_objects()
    )


@contextmanager
def _many_compilations() -> Iterator[None]:
    # Every explanation compiles the same code once more; that is not a storm of recompilations.
    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def reset() -> None:
    """Forget reports, vision masks and kept tokens.  Compiled code stays: torch._dynamo.reset."""
    report.clear()
    keep_idx.clear()
    vision_mask.clear()
