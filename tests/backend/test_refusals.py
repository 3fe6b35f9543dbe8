"""Graphs that dropping tokens would break are refused by name and left unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.plain.decoders import (
    IMAGE,
    Decoder,
    Layer,
    Sizes,
    Style,
    changed,
    prompt,
    pruned_by_hand,
)
from tests.support.plain.refusals import SMALL, assert_declined, assert_pruned
from tests.support.plain.spellings import JOINS, SPLITS, Attention, Context

PAD = 39


# --- operators that read positions ----------------------------------------------------------


def _write_where(layer: Layer, x: Tensor) -> Tensor:
    x = x.clone()
    x[torch.arange(x.shape[1])[None] < 3] = 0.0
    return x


def _write_slice(layer: Layer, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 3:6] = 0.0
    return x


def _conv(layer: Layer, x: Tensor) -> Tensor:
    kernel = layer.table[:3].t().unsqueeze(1)
    return x + F.conv1d(x.mT, kernel, padding=1, groups=x.shape[-1]).mT


READS: dict[str, tuple[str, Callable[[Layer, Tensor], Tensor]]] = {
    "cumsum": ("aten.cumsum", lambda m, x: x + x.cumsum(1) / 9),
    "conv1d": ("aten.conv1d", _conv),
    "flip": ("aten.flip", lambda m, x: x + x.flip(1)),
    "roll": ("aten.roll", lambda m, x: x + x.roll(1, dims=1)),
    "roll, no dims": ("aten.roll", lambda m, x: x + x.roll(x.shape[-1])),
    "first token": ("aten.select", lambda m, x: x + x[:, 0].unsqueeze(1)),
    "first three": ("aten.slice", lambda m, x: x + x[:, :3].mean(1, keepdim=True)),
    "argmax": ("aten.argmax", lambda m, x: x + x.argmax(1, keepdim=True) / 9),
    "max and its place": ("aten.max", lambda m, x: x + x.max(1, keepdim=True)[1] / 9),
    "topk": ("aten.topk", lambda m, x: x + x.topk(2, dim=1)[0].sum(1, keepdim=True)),
    "masked write": ("aten.index_put", _write_where),
    "written slice": ("aten.slice", _write_slice),
}


@pytest.mark.parametrize(("text", "change"), READS.values(), ids=READS)
def test_operator_that_reads_positions(
    text: str, change: Callable[[Layer, Tensor], Tensor]
) -> None:
    declined = assert_declined(Decoder(SMALL, layer=changed(change)), prompt(SMALL), text)
    assert "reads the token axis" in declined.because
    assert declined.where.startswith(__file__)


KEEPS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "cumsum over channels": lambda m, x: x + x.cumsum(-1) / 9,
    "split of channels": lambda m, x: torch.cat(x.split(8, dim=-1)[::-1], dim=-1),
    "max of channels": lambda m, x: x + x.max(-1, keepdim=True)[0],
    "mean of tokens": lambda m, x: x + x.mean(1, keepdim=True),
    "channels in groups": lambda m, x: x.unflatten(-1, (2, 8)).softmax(-1).flatten(2),
    "last token": lambda m, x: x + x[:, -1].unsqueeze(1),
}  # fmt: skip


@pytest.mark.parametrize("change", KEEPS.values(), ids=KEEPS)
def test_the_same_operators_where_they_do_not(change: Callable[[Layer, Tensor], Tensor]) -> None:
    assert_pruned(Decoder(SMALL, layer=changed(change)), prompt(SMALL))


def test_channels_grouped_in_two_ways() -> None:
    def change(layer: Layer, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 8)).sin().flatten(2) + x.unflatten(-1, (4, 4)).cos().flatten(2)

    assert_pruned(Decoder(SMALL, layer=changed(change)), prompt(SMALL))


# --- decoders that cannot be cut ------------------------------------------------------------


class NoNorm(Decoder):
    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        return (self.head(x), *outputs)


class FeatureLayer(Layer):
    """Adds vision features at their positions, as DeepStack does after every layer."""

    def positional(self, x: Tensor, context: Context) -> Tensor:
        mask, features = context.tensors["vision"], context.tensors["features"]
        return x + torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), features)


class FeatureDecoder(Decoder):
    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x, vision = self.merge(ids, features)
        context, outputs = self.context(x, valid), []
        context.add("vision", vision, 1)
        context.add("features", features)
        for layer in self.layers:
            x, k, v = layer(x, context)
            outputs += [k, v]
        return self.finish(x, outputs, [])


class StaticAttention(Attention):
    """Keys and values live in a buffer that is longer than the prompt."""

    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__(z, style)
        for name in ("keys", "values"):
            room = torch.zeros(z.batch, z.kv_heads, z.seq + 8, z.head_dim)
            self.register_buffer(name, room)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = SPLITS["view"](self, x)
        places = torch.arange(x.shape[1])
        self.keys.index_copy_(2, places, k)
        self.values.index_copy_(2, places, v)
        seen = torch.arange(self.keys.shape[2])[None] <= places[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.o(JOINS["reshape"](y)), k, v


class StaticLayer(Layer):
    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__(z, style)
        self.attn = StaticAttention(z, style)


CANNOT = {
    "layer of the depth": (Decoder, Layer, {"layer": 2}, "layer=2, but the decoder stack"),
    "layer beyond": (Decoder, Layer, {"layer": 9}, "a layer from 0 to 1"),
    "no final norm": (NoNorm, Layer, {}, "no norm module next to"),
    "features after the cut": (FeatureDecoder, FeatureLayer, {}, "aten.masked_scatter"),
    "static cache": (Decoder, StaticLayer, {}, "the cache is static"),
}


@pytest.mark.parametrize(("kind", "layer", "options", "text"), CANNOT.values(), ids=CANNOT)
def test_decoder_that_cannot_be_cut(
    kind: type[Decoder], layer: type[Layer], options: dict[str, Any], text: str
) -> None:
    assert_declined(kind(SMALL, layer=layer), prompt(SMALL), text, **options)


# --- writes around the merge ----------------------------------------------------------------


class Pads(Decoder):
    """Embeddings of pads are overwritten before or after the merge; neither write is a merge."""

    def __init__(self, first: bool, token: bool) -> None:
        super().__init__(SMALL)
        self.first = first
        self.row = nn.Parameter(torch.randn(self.z.hidden)) if token else None

    def write(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x.clone()
        x[ids == PAD] = 0.0 if self.row is None else self.row
        return x

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids == IMAGE
        x = self.embed(ids)
        x = self.write(x, ids) if self.first else x
        x = x.masked_scatter(vision.unsqueeze(-1), features)
        return (x if self.first else self.write(x, ids)), vision


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("token", [True, False])
def test_write_of_one_row_is_no_merge(first: bool, token: bool) -> None:
    inputs = prompt(SMALL)
    inputs["ids"][:, -3:-1] = PAD
    assert_pruned(Pads(first, token), inputs)


# --- masks ----------------------------------------------------------------------------------


class Alibi(Decoder):
    """A bias per head [H, S, S].  With two heads and two rows nothing but its use tells which."""

    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__(z, style)
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x, vision = super().merge(ids, features)
        return x * self.scale, vision

    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        context, places = super().context(x, valid), torch.arange(x.shape[1])
        slope = 0.5 ** torch.arange(1, self.z.heads + 1)
        ahead = places[None] - places[:, None]
        bias = (slope[:, None, None] * ahead).masked_fill(ahead > 0, -1e9)
        context.add("mask", bias * self.scale, 1, 2)
        return context


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_are_not_taken_for_the_batch(heads: int) -> None:
    z = Sizes(batch=2, heads=heads, kv_heads=heads, layers=2)
    model = Alibi(z, Style(attend="softmax"))
    assert_declined(model, prompt(z), "attention mask before the cut is not [*, *, Q, S]")


@pytest.mark.parametrize(
    ("attend", "mask"),
    [
        ("filled", "4d_bool"),
        ("filled_where", "4d_bool"),
        ("where", "4d_bool"),
        ("softmax", "4d_float"),
        ("sdpa", "4d_bool"),
    ],
)
def test_hidden_tokens_are_never_pivots(attend: str, mask: str) -> None:
    z = Sizes(seq=44, vision=24, layers=2)
    inputs = prompt(z, (0,))
    inputs["valid"][:, -6:] = False
    model = Decoder(z, Style(attend=attend, mask=mask))
    outputs = assert_pruned(model, inputs, 16, known_valid=True, uniform=True)
    with torch.no_grad():  # the pads are such that they would have been chosen
        unaware = pruned_by_hand(model, inputs, 16, 1, uniform=True)
    assert not torch.allclose(outputs[-1], unaware[-1])


def test_router_is_no_attention() -> None:
    assert_pruned(Decoder(SMALL, Style(mlp="mixture", attend="softmax")), prompt(SMALL))


def test_conversion_that_converts_nothing() -> None:
    class Wide(Decoder):
        def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
            return (self.head(self.norm(x.float())), x.float(), *outputs)

    layer = changed(lambda m, x: x.float() + x.to(x.dtype) * 0.1)
    assert_pruned(Wide(SMALL, Style(norm="rms"), layer=layer), prompt(SMALL))
