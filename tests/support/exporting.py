"""Helpers for tests of exported programs: wrappers that return plain tensors, and exporting."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from tests.support.tolerances import CLOSE, RETAIN

Inputs = dict[str, Tensor]

LENGTH = {"input_ids": {1: Dim("length", min=20, max=300)}}
LENGTH |= {"attention_mask": LENGTH["input_ids"], "pixel_values": None}


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


def oracle(family: Family, inputs: Inputs, **options: Any) -> hooked.Pruned:
    options = {"retain": RETAIN, "kv_layout": "uniform", **options}
    return hooked.pruned_forward(family.model, inputs, **options)


def assert_same(output: Any, wanted: hooked.Pruned) -> None:
    logits, layers = output
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    assert [keys.shape[2] for keys, _ in layers] == wanted.kv_lengths
    for (keys, values), wanted_keys, wanted_values in zip(
        layers, wanted.keys, wanted.values, strict=True
    ):
        torch.testing.assert_close(keys, wanted_keys, **CLOSE)
        torch.testing.assert_close(values, wanted_values, **CLOSE)


def uneven(family: Family, inputs: Inputs) -> Inputs:
    """The same batch with two vision tokens less in row 0 and two more in row 1."""
    ids, image = inputs["input_ids"].clone(), family.image_token_id
    ids[0, (ids[0] == image).nonzero()[-2:]] = 5
    last = int((ids[1] == image).nonzero()[-1])
    ids[1, last + 1 : last + 3] = image
    return inputs | {"input_ids": ids}
