"""transformers' capturing of outputs, prepared for compiled calls and for threads."""

from __future__ import annotations

import sys

import torch
from torch import nn

from dartfx import compat

__all__ = ["prepare_capturing"]


def prepare_capturing(model: nn.Module) -> None:
    """Install what transformers installs lazily inside the first forward, under a lock that dynamo
    cannot trace, and keep the outputs captured in one thread apart from those of others."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    _capture_by_thread()
    install = compat.find("maybe_install_capturing_hooks")
    if install is None:  # then the first call has a graph break, and is compiled as several graphs
        return
    # Installing on a model installs on every model inside, once more where that was done before.
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            getattr(inner, "_output_capturing_hooks_installed", False) for inner in module.modules()
        ):
            install(module)


def _capture_by_thread() -> None:
    """Let transformers share captured outputs only in code that dynamo traces.

    It keeps them in a global while ``torch.compiler.is_compiling()``, which one thread that
    compiles sets for all: vision towers that run in other threads got each other's hidden states.
    """
    capturing = compat.find("output_capturing")
    if hasattr(capturing, _FLAG):
        setattr(capturing, _FLAG, torch.compiler.is_dynamo_compiling)


_FLAG = "is_torchdynamo_compiling"
