"""``dartfx.compile``, ``uncompile`` and ``reset``: the backend made easy to use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from torch import nn

from dartfx.config.options import DartConfig
from dartfx.config.validators import CHECKS
from dartfx.errors import ConfigError
from dartfx.model.attached import attach, detach
from dartfx.model.capturing import prepare_capturing
from dartfx.model.compiled_model import CompiledModel
from dartfx.model.target import inner_model
from dartfx.observe import report
from dartfx.runtime import call_budget, keep_idx, vision_mask
from dartfx.runtime.call_budget import CallBudget
from dartfx.runtime.prefill.prefills import MULTIPLE, Prefills

__all__ = ["budget", "compile", "reset", "uncompile"]

Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    prefill: Literal["graphs", "bucketed"] | None = None,
    decode: Literal["static"] | None = None,
    logits: Literal["kept", "full"] = "kept",
    **options: object,
) -> Module:
    """Compile ``model`` in place with the dart backend, for its calls and for ``generate``.

    mode, dynamic: as in ``torch.compile``; options: those of :class:`DartConfig`, by default what
    the environment's ``DARTFX_OPTIONS`` holds.  Uses one graph for the whole model where dynamo can
    trace it and falls back to several where not.  Hooks that transformers would install during the
    first call are installed now, since installing them breaks the graph.  prefill: "graphs" runs
    calls with vision inputs as CUDA graphs, one for every length of a prompt; "bucketed" pads
    prompts to multiples of 64 tokens first, so that a graph serves many.  decode: "static" makes
    ``generate`` use a static cache by default, so that decode steps share one graph (on CUDA,
    transformers puts them into CUDA graphs).  Of PEFT's wrappers the model inside is compiled,
    which is what their calls end in.  logits: "full" returns those of pruned calls (of a backbone,
    the hidden states) at the prompt's length, for a Trainer's label smoothing and metrics; a
    dropped token's are those of the last kept token before it.

    Returns ``model``.  Raises ConfigError for an invalid option or a decode that the model does not
    have, TypeError for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.compile needs a torch.nn.Module, got {type(model).__name__}")
    config = DartConfig.of_call(options, mode)
    inner = inner_model(model)
    _check_decode(inner, decode, config)
    if logits not in ("kept", "full"):
        raise ConfigError(f'logits is {logits!r}; it can be "kept" or "full"')
    prepare_capturing(inner)
    compiled = CompiledModel.of(inner, config, dynamic, _prefills(inner, prefill, config))
    compiled.full_logits = logits == "full"
    attach(inner, compiled, static=decode == "static", dynamic=dynamic)
    return model


def uncompile(model: Module) -> Module:
    """Undo :func:`compile`: ``model`` runs as its class defines it.

    Does nothing to a model that is not compiled.  Returns ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.uncompile needs a torch.nn.Module, got {type(model).__name__}")
    detach(inner_model(model))
    return model


@contextmanager
def budget(
    model: nn.Module, retain_tokens: int | None = None, *, reduction_ratio: float | None = None
) -> Iterator[None]:
    """Let the calls of a compiled model inside the ``with`` block keep another number of tokens.

    model: compiled by :func:`compile`, which stays as it is; ``generate`` and pipelines call it as
    ever.  retain_tokens, reduction_ratio: one of them, as in the options; a ratio of at most four
    decimals.  All numbers share one more compilation (two at most, where dynamo first takes the
    size for fixed).  Raises ConfigError where they do not fit the options, and in the call
    SelectionError where its graph cannot take a budget.
    """
    inner = inner_model(model)
    with call_budget.requested_for(inner, _checked_budget(inner, retain_tokens, reduction_ratio)):
        yield


def _checked_budget(model: nn.Module, retain_tokens: object, reduction_ratio: object) -> CallBudget:
    compiled = model._compiled_call_impl
    if not isinstance(compiled, CompiledModel):
        raise ConfigError("dartfx.budget needs a model that dartfx.compile compiled in place")
    if (retain_tokens is None) == (reduction_ratio is None):
        raise ConfigError(
            f"dartfx.budget takes retain_tokens or reduction_ratio, got {retain_tokens} and "
            f"{reduction_ratio}"
        )
    config = compiled.config
    if len(config.layers) > 1 or isinstance(config.quota, tuple):
        what = f"quota={config.quota}" if len(config.layers) == 1 else f"layer={config.layers}"
        raise ConfigError(
            f"dartfx.budget gives one number, but the model was compiled with {what}, which has "
            "several"
        )
    if retain_tokens is not None:
        return CallBudget("tokens", CHECKS["retain_tokens"]("retain_tokens", retain_tokens))  # type: ignore[arg-type]
    ratio: Any = CHECKS["reduction_ratio"]("reduction_ratio", reduction_ratio)
    share = None if isinstance(ratio, tuple) else CallBudget.of_ratio(ratio)
    if share is None:
        raise ConfigError(
            f"reduction_ratio={ratio} of one call must be one number of at most four decimals"
        )
    return share


def _prefills(model: nn.Module, prefill: object, config: DartConfig) -> Prefills | None:
    if prefill is None:
        return None
    if prefill not in ("graphs", "bucketed"):
        raise ConfigError(f'prefill is {prefill!r}; it can be "graphs", "bucketed" or None')
    if config.quota != "joint":
        raise ConfigError(
            f"prefill={prefill!r} replays launches, and quota={config.quota!r} counts tokens on "
            "the host in between; leave one of them out"
        )
    if config.inductor_patches().get("triton.cudagraphs"):
        raise ConfigError(
            f"prefill={prefill!r} records CUDA graphs itself; leave out mode={config.mode!r}, or "
            "use max-autotune-no-cudagraphs"
        )
    if prefill == "bucketed" and config.kv_layout == "layered":
        raise ConfigError(
            'prefill="bucketed" pads prompts, which kv_layout="layered" does not take; try '
            'prefill="graphs"'
        )
    return Prefills(model, MULTIPLE if prefill == "bucketed" else 1)


def _check_decode(model: nn.Module, decode: object, config: DartConfig) -> None:
    if decode is None:
        return
    if decode != "static":
        raise ConfigError(f'decode is {decode!r}; it can be "static" or None')
    if config.kv_layout == "layered":
        raise ConfigError(
            'decode="static" needs as many tokens in the caches of all layers, and '
            'kv_layout="layered" leaves two lengths; try kv_layout="uniform" or "auto"'
        )
    if getattr(model, "generation_config", None) is None:
        raise ConfigError(
            f'decode="static" is a default of generate, and {type(model).__name__} has no '
            "generation_config"
        )


def reset() -> None:
    """Forget reports, vision masks and kept tokens.  Compiled code stays: torch._dynamo.reset."""
    report.clear()
    keep_idx.clear()
    vision_mask.clear()
