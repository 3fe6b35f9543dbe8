"""Causal convolutions behind the cut run over the kept tokens, closed up; others are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dartfx
from dartfx.passes.outcome import OrderMixing, Pruned
from tests.support.plain.decoders import (
    Decoder,
    Layer,
    Sizes,
    assert_same,
    changed,
    prompt,
    pruned_by_hand,
    run,
)
from tests.support.plain.refusals import RETAIN, SMALL, assert_declined, assert_pruned

TWO_ROWS = Sizes(layers=3, batch=2)


def _kernel(layer: Layer, width: int) -> Tensor:
    return layer.table[:width].T[:, None]  # [D, 1, k], one kernel for each channel


def _depthwise(layer: Layer, x: Tensor, width: int, **how: int) -> Tensor:
    return F.conv1d(x.mT, _kernel(layer, width), groups=x.shape[-1], **how)


def padded_behind_too(layer: Layer, x: Tensor) -> Tensor:
    return x + _depthwise(layer, x, 4, padding=3)[:, :, : x.shape[1]].mT


def padded_in_front(layer: Layer, x: Tensor) -> Tensor:
    return x + F.conv1d(F.pad(x.mT, (2, 0)), _kernel(layer, 3), groups=x.shape[-1]).mT


def dilated(layer: Layer, x: Tensor) -> Tensor:
    # The tail of all tokens is all of them, as transformers cuts off what a cache brought.
    head = _depthwise(layer, x, 3, padding=4, dilation=2)[:, :, : x.shape[1]]
    return x + head[:, :, -x.shape[1] :].mT


def across_channels(layer: Layer, x: Tensor) -> Tensor:
    kernel = layer.table[: x.shape[-1], :, None].expand(-1, -1, 3)
    return x + F.conv1d(x.mT, kernel, padding=2)[:, :, : x.shape[1]].mT


CAUSAL = [padded_behind_too, padded_in_front, dilated, across_channels]


@pytest.mark.parametrize("mix", CAUSAL)
def test_causal(mix: Callable[[Layer, Tensor], Tensor]) -> None:
    assert_pruned(Decoder(SMALL, layer=changed(mix)), prompt(SMALL))


@pytest.mark.parametrize("dynamic", [False, True])
def test_batches_by_their_rows(dynamic: bool) -> None:
    model, inputs = Decoder(TWO_ROWS, layer=changed(padded_behind_too)).eval(), prompt(TWO_ROWS)
    outputs, outcome = run(model, inputs, dynamic=dynamic, retain_tokens=RETAIN, layer=1)
    assert isinstance(outcome, Pruned)
    assert outcome.order_mixing == OrderMixing(2, ("conv1d",))
    assert "2 layers mix tokens by order: conv1d; they run over" in str(dartfx.reports()[-1])
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1, uniform=True))


def not_cut_off(layer: Layer, x: Tensor) -> Tensor:
    whole = _depthwise(layer, x, 4, padding=3)
    return x + whole[:, :, : x.shape[1]].mT + whole[:, :, -1:].mT


def cut_off_in_front(layer: Layer, x: Tensor) -> Tensor:
    return x + _depthwise(layer, x, 4, padding=3)[:, :, 3:].mT


def centred(layer: Layer, x: Tensor) -> Tensor:
    return x + _depthwise(layer, x, 3, padding=1).mT


def padded_behind(layer: Layer, x: Tensor) -> Tensor:
    return x + F.conv1d(F.pad(x.mT, (0, 2)), _kernel(layer, 3), groups=x.shape[-1]).mT


def padded_with_ones(layer: Layer, x: Tensor) -> Tensor:
    padded = F.pad(x.mT, (2, 0), value=1.0)
    return x + F.conv1d(padded, _kernel(layer, 3), groups=x.shape[-1]).mT


def reflected(layer: Layer, x: Tensor) -> Tensor:
    padded = F.pad(x.mT, (2, 0), mode="reflect")
    return x + F.conv1d(padded, _kernel(layer, 3), groups=x.shape[-1]).mT


def wider_than_padded(layer: Layer, x: Tensor) -> Tensor:
    return x + _depthwise(layer, x, 3, padding=2, dilation=2)[:, :, : x.shape[1]].mT


def backwards(layer: Layer, x: Tensor) -> Tensor:
    return x + padded_behind_too(layer, x.flip(1)).flip(1)


def continued(layer: Layer, x: Tensor) -> Tensor:
    joined = torch.cat([layer.table[None, :3].expand(x.shape[0], -1, -1), x], 1).mT
    return x + F.conv1d(joined, _kernel(layer, 4), groups=x.shape[-1]).mT


OTHERS = {
    not_cut_off: "aten.conv1d",
    cut_off_in_front: "aten.conv1d",
    centred: "aten.conv1d",
    padded_behind: "aten.pad",
    padded_with_ones: "aten.pad",
    reflected: "aten.pad",
    wider_than_padded: "aten.conv1d",
    backwards: "aten.flip",
    continued: "aten.conv1d",
}


@pytest.mark.parametrize("mix", OTHERS)
def test_others_are_declined(mix: Callable[[Layer, Tensor], Tensor]) -> None:
    declined = assert_declined(Decoder(SMALL, layer=changed(mix)), prompt(SMALL), OTHERS[mix])
    assert declined.where


def test_refused_on_request() -> None:
    model = Decoder(SMALL, layer=changed(padded_behind_too))
    text = "1 layer mixes tokens by order: conv1d, and order_mixing='refuse' allows none"
    declined = assert_declined(model, prompt(SMALL), text, order_mixing="refuse")
    assert "F.conv1d" in declined.where


class NoAttention(nn.Module):
    """Stands where attention does, as the recurrent layers of a hybrid do."""

    def forward(self, x: Tensor, context: object) -> tuple[Tensor, Tensor, Tensor]:
        return x.tanh(), x, x


def test_a_layer_without_attention_before_the_cut() -> None:
    model = Decoder(Sizes(layers=3))
    model.layers[0].attn = NoAttention()
    text = "holds 0 attention operations, expected one; try: layer=2: the one before the cut"
    assert_declined(model, prompt(model.z), text)


class Ending(Decoder):
    """Returns the last inputs of its convolutions, as a cache keeps them."""

    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> object:
        return super().finish(x, [*outputs, x.mT[:, :, -self.width :]], hidden)

    width = 4


def test_a_window_that_pruning_leaves_unfilled() -> None:
    model, inputs = Ending(SMALL, layer=changed(padded_behind_too)), prompt(SMALL)
    assert_pruned(model, inputs)
    model.width = SMALL.seq - SMALL.vision + RETAIN + 1
    assert_declined(model, inputs, "after pruning, aten.slice")
