"""What the tests of exported programs share: wrappers that return plain tensors, and exporting."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dartfx.tools.zoo.family import Family

Inputs = dict[str, Tensor]


class Prefill(nn.Module):
    """A model's logits, and the keys and values of its layers after them."""

    def __init__(self, model: nn.Module, caches: bool = True) -> None:
        super().__init__()
        self.model, self.caches = model, caches

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            use_cache=self.caches,
        )
        if not self.caches:
            return output.logits
        return output.logits, [(e.keys, e.values) for e in output.past_key_values.layers]


def export(
    model: nn.Module,
    inputs: Inputs,
    strict: bool = False,
    dynamic: Any = None,
    grad: bool = False,
    **more: Any,
) -> ExportedProgram:
    """torch.export of ``model(**inputs)``, which is called once before: that installs hooks."""
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strict export speaks of what transformers' hooks write
        model(**inputs)
        return torch.export.export(model, (), inputs, strict=strict, dynamic_shapes=dynamic, **more)


def prefill(family: Family, inputs: Inputs, strict: bool = False, **more: Any) -> ExportedProgram:
    return export(Prefill(family.model, **more), inputs, strict)
