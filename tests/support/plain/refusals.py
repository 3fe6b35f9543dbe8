"""Checks that a small decoder was pruned correctly, or left unchanged with a reason."""

from __future__ import annotations

from typing import Any

import torch

from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import Decoder, Inputs, Sizes, assert_same, pruned_by_hand, run

RETAIN = 5
SMALL = Sizes(layers=2)


def assert_declined(model: Decoder, inputs: Inputs, text: str, **options: Any) -> Declined:
    """The outcome names ``text``; the outputs are those of the plain model, to the bit."""
    model.eval()
    outputs, outcome = run(model, inputs, **({"retain_tokens": RETAIN, "layer": 1} | options))
    assert isinstance(outcome, Declined), outcome
    assert text in str(outcome)
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)
    return outcome


def assert_pruned(model: Decoder, inputs: Inputs, retain: int = RETAIN, **by_hand: Any) -> Any:
    """The outputs, which are those of the model pruned by hand."""
    model.eval()
    outputs, outcome = run(model, inputs, retain_tokens=retain, layer=1)
    assert isinstance(outcome, Pruned), outcome
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, retain, 1, **by_hand))
    return outputs
