"""A model that a caller names directly or by a bound method, and another call in its stead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["model_of", "replaced_call"]

Call = Callable[..., Any]


def model_of(target: nn.Module | Call, function: str) -> tuple[Call, nn.Module]:
    """(what to call, its model) of a model or a method of one; function: for the error's text.

    Raises TypeError for anything else.
    """
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target)  # the model inside torch.compile's wrapper
    model = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} needs a model or a method of one, such as model.generate")
    return target, model


@contextmanager
def replaced_call(model: nn.Module, call: Call) -> Iterator[None]:
    """Let calls of ``model`` run ``call`` inside the ``with`` block, as compiled ones do."""
    current = model._compiled_call_impl
    model._compiled_call_impl = call
    try:
        yield
    finally:
        model._compiled_call_impl = current
