"""transformers' capturing of outputs, prepared for compiled calls and for threads."""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch import nn

from dartfx import compat

__all__ = ["Collector", "prepare_capturing"]


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
    # Installing on a model installs on every model inside, again where that was done before.
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            getattr(inner, "_output_capturing_hooks_installed", False) for inner in module.modules()
        ):
            install(module)


def _capture_by_thread() -> None:
    """Let transformers keep captured outputs in a variable of each thread.

    It keeps them in a global while ``torch.compiler.is_compiling()``, which one thread that
    compiles sets for all: vision towers that run in other threads got each other's hidden states.
    """
    capturing = compat.find("output_capturing")
    if hasattr(capturing, _COLLECTOR) and not isinstance(getattr(capturing, _COLLECTOR), Collector):
        setattr(capturing, _COLLECTOR, Collector())


_COLLECTOR = "_active_collector"


class Collector:
    """The current collector: a variable of each thread, also in code that dynamo traces.

    transformers' own is a ContextVar where the model's forward is not traced.  Dynamo cannot trace
    its ``get``, so the hooks broke the graph in every decoder layer; it can trace a thread's.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()

    def get(self) -> Any:
        """The dict that outputs are collected in, or None."""
        return self._of_thread.value

    def set(self, value: Any) -> tuple[Any]:
        """Collect in ``value``; returns what :meth:`reset` needs."""
        before = self._of_thread.value
        self._of_thread.value = value
        return (before,)

    def reset(self, token: tuple[Any]) -> None:
        """Collect as before."""
        self._of_thread.value = token[0]


class _OfThread(threading.local):
    """There from a thread's first call on: dynamo guards on whether an attribute exists."""

    def __init__(self) -> None:
        self.value: Any = None
