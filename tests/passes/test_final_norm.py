"""The module whose norm ranks tokens is the decoder's final norm, or none is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dartfx
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import (
    Decoder,
    Sizes,
    assert_same,
    compiled,
    prompt,
    pruned_by_hand,
)
from tests.support.plain.refusals import RETAIN, SMALL, assert_declined, assert_pruned


class NoNorm(Decoder):
    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        return (self.head(x), *outputs)


def test_square_head_is_no_norm() -> None:
    z = Sizes(layers=2, vocab=Sizes.hidden)
    assert_declined(NoNorm(z), prompt(z), "no norm module next to")


class TwoNorms(Decoder):
    def __init__(self, z: Sizes) -> None:
        super().__init__(z)
        self.aside = nn.LayerNorm(z.hidden)

    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        return (self.head(self.aside(x) + self.norm(x)), *outputs)


def test_one_of_two_norms() -> None:
    assert_declined(TwoNorms(SMALL), prompt(SMALL), "may be the norm")


class Dropping(Decoder):
    def __init__(self, z: Sizes) -> None:
        super().__init__(z)
        self.drop = nn.Dropout(0.5)

    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        return super().finish(self.drop(x), outputs, hidden)


def test_dropout_is_no_norm() -> None:
    z = Sizes(seq=44, vision=24, layers=2)
    assert_pruned(Dropping(z), prompt(z), 12)
    torch.compiler.reset()
    model = Dropping(SMALL).train()
    with torch.no_grad():
        compiled(model, retain_tokens=RETAIN, layer=1)(**prompt(SMALL))
    assert isinstance(dartfx.reports()[-1].outcome, Declined)


class InPlaceNorm(nn.Module):
    """Scales what it is given, in place; ``copies`` leaves that as it was."""

    copies = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.copies else x.float()
        return x.div_(x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


def test_norm_in_place() -> None:
    model, inputs = Decoder(SMALL), prompt(SMALL)
    model.norm = InPlaceNorm()
    with torch.no_grad():
        outputs = compiled(model.eval(), retain_tokens=RETAIN, layer=1)(**inputs)
        model.norm.copies = True
        assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1))
