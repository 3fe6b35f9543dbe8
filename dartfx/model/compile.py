"""``dartfx.compile`` and ``dartfx.reset``: the backend made easy to use."""

from __future__ import annotations

import sys
from typing import Literal, TypeVar

from torch import nn

from dartfx import compat
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from dartfx.model.compiled_model import CompiledModel
from dartfx.model.own_generate import watch_generate
from dartfx.observe import report
from dartfx.runtime import keep_idx, vision_mask

__all__ = ["compile", "reset"]

Module = TypeVar("Module", bound=nn.Module)


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
        _use_static_cache(model, decode, config)
    _install_capturing_hooks(model)
    model._compiled_call_impl = compiled = CompiledModel.of(model, config, dynamic)
    watch_generate(model, compiled)
    return model


def _use_static_cache(model: nn.Module, decode: object, config: DartConfig) -> None:
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
    install = compat.find("maybe_install_capturing_hooks")
    if install is None:  # then the first call has a graph break, and is compiled as several graphs
        return
    # Installing on a model installs on every model inside, once more where that was done before.
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            getattr(inner, "_output_capturing_hooks_installed", False) for inner in module.modules()
        ):
            install(module)


def reset() -> None:
    """Forget reports, vision masks and kept tokens.  Compiled code stays: torch._dynamo.reset."""
    report.clear()
    keep_idx.clear()
    vision_mask.clear()
