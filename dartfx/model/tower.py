"""Keeping the vision tower in the decoder's graph, for selectors that need its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dartfx.selection.registry import optional_inputs

__all__ = ["ENCODES", "call_of", "is_needed"]

# Its result decides whether ``generate`` computes features ahead of the model's call.
ENCODES = "_supports_mm_encoder_outputs"


def is_needed(selector: str) -> bool:
    """Whether a selector needs the tower's attention."""
    return "tower_attention" in optional_inputs(selector)


def call_of(model: nn.Module, selector: str) -> Callable[..., Any]:
    """The call of ``model`` that is compiled.

    transformers takes names out of the keywords that a forward was called with, and dynamo reads no
    signature any more once a dict that came with the call was changed, as functions that make
    features do.  A function around the model has a dict as well.
    """
    own: Callable[..., Any] = model._call_impl
    if not is_needed(selector):
        return own

    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return call
