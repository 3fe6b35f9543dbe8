"""The ``generate`` of a model's own class, and whether it calls what was compiled."""

from __future__ import annotations

import sys
from functools import update_wrapper
from typing import Any

from torch import nn

from dartfx.model.compiled_model import Call, CompiledModel
from dartfx.passes.refusal import Declined

__all__ = ["watch_generate"]


def watch_generate(model: nn.Module, compiled: CompiledModel) -> None:
    """Report when a ``generate`` that the model's class defines never calls what was compiled."""
    own = getattr(type(model), "generate", None)
    transformers = sys.modules.get("transformers")
    if transformers is None or own is None or own is transformers.GenerationMixin.generate:
        return

    model.generate = _WatchedGenerate(model, compiled)  # type: ignore[assignment]


class _WatchedGenerate:
    """The ``generate`` of a compiled model.  A copy of the model has its own, not this one."""

    def __init__(self, model: nn.Module, compiled: CompiledModel) -> None:
        self._model, self._compiled = model, compiled
        self._own: Call = getattr(type(model), "generate")  # noqa: B009  mypy knows no such method
        update_wrapper(self, self._own)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying and pickling drop what was compiled, so the class's method is left.
        return getattr, (self._model, "generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, compiled = self._model, self._compiled
        before = compiled.calls
        result = self._own(model, *args, **kwargs)
        if model._compiled_call_impl is compiled and compiled.calls == before:
            declined = Declined(
                f"{type(model).__name__}.generate runs a model inside this one and never calls "
                "what was compiled",
                advice="dartfx.compile that inner model, and mark its vision tokens with "
                "dartfx.vision_tokens",
            )
            with compiled.reporting():
                compiled.refuse(declined)
        return result
