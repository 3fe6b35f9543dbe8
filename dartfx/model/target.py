"""A model given directly or by a bound method, and a replacement of its call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["inner_model", "model_of", "replaced_call"]

Call = Callable[..., Any]


def inner_model(model: nn.Module) -> nn.Module:
    """The model that a wrapper's calls and ``generate`` reach; itself where it is no wrapper.

    PEFT's wrappers put adapters into a model in place and then pass calls on to it, some of them
    past what would be compiled with the wrapper.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return model
    adapted = peft.PeftModel, peft.PeftMixedModel
    while True:
        if isinstance(model, adapted):
            inner = model.base_model
        elif isinstance(model, peft.tuners.tuners_utils.BaseTuner):
            inner = model.model
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def model_of(target: nn.Module | Call, function: str) -> tuple[Call, nn.Module]:
    """(what to call, its model) of a model or a method of one; function: for the error's text.

    Raises TypeError for anything else.
    """
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target)  # the model inside torch.compile's wrapper
    model = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} needs a model or a method of one, such as model.generate")
    return target, inner_model(model)


@contextmanager
def replaced_call(model: nn.Module, call: Call) -> Iterator[None]:
    """Make calls of ``model`` run ``call`` inside the ``with`` block, as compiled ones do."""
    current = model._compiled_call_impl
    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = current
