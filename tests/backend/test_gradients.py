"""Gradients through the cut equal those of the decoder pruned by hand, or the graph is declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import (
    Decoder,
    Inputs,
    Layer,
    assert_same,
    changed,
    compiled,
    prompt,
    pruned_by_hand,
)
from tests.support.plain.refusals import RETAIN, SMALL, assert_pruned


def gradients(model: Decoder, call: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    call(**inputs)[0].square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def no_gradient_first(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean(-1, keepdim=True) + 1
    return x / scale


def lower_precision_first(layer: Layer, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ layer.table[:16].mT[:, :16]
    return x + y.float()


FIRST = {"no_grad": no_gradient_first, "autocast": lower_precision_first}


@pytest.mark.slow
def test_gradients_through_inductor() -> None:
    """Those of every parameter, and of the vision features."""
    model, inputs = Decoder(SMALL).eval(), prompt(SMALL)
    features = inputs["features"].requires_grad_()

    def of(call: Callable[..., Any]) -> dict[str, Tensor]:
        features.grad = None
        found = gradients(model, call, inputs)
        assert features.grad is not None
        return {**found, "features": features.grad.clone()}

    found = of(compiled(model, retain_tokens=RETAIN, layer=1, lowering="inductor"))
    assert isinstance(dartfx.reports()[-1].outcome, Pruned)
    expected = of(lambda **i: pruned_by_hand(model, i, RETAIN, 1))
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_gradients_where_a_layer_starts_with(first: Callable[[Layer, Tensor], Tensor]) -> None:
    model, inputs = Decoder(SMALL, layer=changed(first)).eval(), prompt(SMALL)
    found = gradients(model, compiled(model, retain_tokens=RETAIN, layer=1), inputs)
    assert isinstance(dartfx.reports()[-1].outcome, Pruned)
    expected = gradients(model, lambda **i: pruned_by_hand(model, i, RETAIN, 1), inputs)
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()))


class Weaker(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.1


def test_function_with_its_own_backward() -> None:
    model = Decoder(SMALL, layer=changed(lambda m, x: Weaker.apply(x))).eval()
    inputs = prompt(SMALL)
    found = gradients(model, compiled(model, retain_tokens=RETAIN, layer=1), inputs)
    outcome = dartfx.reports()[-1].outcome
    assert isinstance(outcome, Declined)
    assert "torch.autograd.Function" in outcome.because
    expected = gradients(model, model, inputs)
    assert_same(list(found.values()), list(expected.values()))
    torch.compiler.reset()
    assert_pruned(model, inputs)  # without gradients it is what its forward computes
