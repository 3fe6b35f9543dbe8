"""What a selection reads from an eager model, and how hooks get it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SelectionInputs", "Selector", "attention_keys", "final_norm", "replaced"]


@dataclass(frozen=True)
class SelectionInputs:
    """All inputs of a selection, taken before decoder layer K.

    ``hidden`` [B, S, C]: layer K's input after the model's final norm.
    ``keys`` [B, H, S, D]: keys of layer K-1 after rotary embedding, as stored in the cache, or as
    used by attention if the cache holds something else.  Before layer 0, ``hidden`` are the
    embeddings themselves and ``keys`` have no heads.
    ``vision`` and ``valid`` [B, S] bool: vision tokens; tokens that are not padding.
    """

    hidden: Tensor
    keys: Tensor
    vision: Tensor
    valid: Tensor


Selector = Callable[[SelectionInputs, int], Tensor]
"""(selection_inputs, retain) -> keep_idx [B, S'] int64, ascending in each row."""


def final_norm(decoder: Any) -> Any:
    """The norm behind the decoder's last layer.  Raises TypeError where its name is not known."""
    names = "norm final_layernorm final_layer_norm embedding_norm norm_f layer_norm"
    for name in names.split():
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise TypeError(f"no final norm known for {type(decoder).__name__}; add it to final_norm")


@contextmanager
def attention_keys(layer: Any, note: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``note`` with the keys that a decoder layer passes to its attention call."""
    attend = torch.nn.functional.scaled_dot_product_attention
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def recorder(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            note(key)
        return attend(query, key, *args, **kwargs)

    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with replaced(torch.nn.functional, "scaled_dot_product_attention", recorder):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute that hooks cannot reach, inside the ``with`` block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
