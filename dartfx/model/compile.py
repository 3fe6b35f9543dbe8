"""``dartfx.compile``, ``uncompile`` and ``reset``: the backend made easy to use."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from dartfx.model.attached import attach, detach
from dartfx.model.capturing import prepare_capturing
from dartfx.model.compiled_model import CompiledModel
from dartfx.model.target import inner_model
from dartfx.observe import report
from dartfx.runtime import keep_idx, vision_mask

__all__ = ["compile", "reset", "uncompile"]

Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    decode: Literal["static"] | None = None,
    logits: Literal["kept", "full"] = "kept",
    **options: object,
) -> Module:
    """Compile ``model`` in place with the dart backend, for its calls and for ``generate``.

    mode, dynamic: as in ``torch.compile``; options: those of :class:`DartConfig`.  Uses one graph
    for the whole model where dynamo can trace it and falls back to several where not.  Hooks that
    transformers would install during the first call are installed now, since installing them
    breaks the graph.  decode: "static" makes ``generate`` use a static cache by default, so that
    decode steps share one graph (on CUDA, transformers puts them into CUDA graphs).  Of PEFT's
    wrappers the model inside is compiled, which is what their calls end in.  logits: "full" returns
    those of pruned calls at the prompt's length, for a Trainer's label smoothing and metrics; a
    dropped token's are those of the last kept token before it.

    Returns ``model``.  Raises ConfigError for an invalid option or a decode that the model does not
    have, TypeError for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.compile needs a torch.nn.Module, got {type(model).__name__}")
    config = DartConfig.from_options(options, mode)
    inner = inner_model(model)
    _check_decode(inner, decode, config)
    if logits not in ("kept", "full"):
        raise ConfigError(f'logits is {logits!r}; it can be "kept" or "full"')
    prepare_capturing(inner)
    compiled = CompiledModel.of(inner, config, dynamic)
    compiled.full_logits = logits == "full"
    attach(inner, compiled, static=decode == "static")
    return model


def uncompile(model: Module) -> Module:
    """Undo :func:`compile`: ``model`` runs as its class defines it.

    Does nothing to a model that is not compiled.  Returns ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dartfx.uncompile needs a torch.nn.Module, got {type(model).__name__}")
    detach(inner_model(model))
    return model


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
