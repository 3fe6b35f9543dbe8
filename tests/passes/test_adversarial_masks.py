"""Masks that could be misread: attention masks, packed rows, and tables without a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import (
    IMAGE,
    Decoder,
    Inputs,
    Sizes,
    Style,
    assert_same,
    by_operator,
    compiled,
    prompt,
    pruned_by_hand,
)
from tests.support.plain.refusals import assert_declined, assert_pruned
from tests.support.plain.spellings import JOINS, SPLITS, Attention, Context, rotate

PADDED = Sizes(seq=44, vision=24, layers=2)
THREE = Sizes(layers=3)


# --- what hides a key from attention ------------------------------------------------------------

# scores [B, H, S, S], what may be seen [B, 1, S, S] -> weights
Weigh = Callable[[Tensor, Tensor], Tensor]


class MaskedAttention(Attention):
    def __init__(self, z: Sizes, style: Style, weigh: Weigh) -> None:
        super().__init__(z, style)
        self.weigh = weigh

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = SPLITS["view"](self, x)
        weights = self.weigh(q @ k.mT / 3, context.tensors["seen"])
        return self.o(JOINS["reshape"](weights @ v)), k, v


class Masked(Decoder):
    def __init__(self, weigh: Weigh) -> None:
        super().__init__(PADDED)
        for layer in self.layers:
            layer.attn = MaskedAttention(PADDED, Style(), weigh)

    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        assert valid is not None
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        context = Context()
        context.add("seen", causal & valid[:, None, None, :], 2, 3)
        return context


def padded() -> Inputs:
    inputs = prompt(PADDED, (0,))
    inputs["valid"][:, -6:] = False
    return inputs


HIDES: dict[str, Weigh] = {
    "-1e4": lambda s, seen: (s + (~seen).float() * -1e4).softmax(-1),
    "-inf": lambda s, seen: (s + torch.where(seen, 0.0, -torch.inf)).softmax(-1),
    "of integers": lambda s, seen: (s + (~seen).long() * -100000).softmax(-1),
    "clamped": lambda s, seen: (s + (~seen).float() * -1e9).clamp(min=-1e30).softmax(-1),
}


@pytest.mark.parametrize("weigh", HIDES.values(), ids=HIDES)
def test_mask_that_hides_pads(weigh: Weigh) -> None:
    model, inputs = Masked(weigh), padded()
    outputs = assert_pruned(model, inputs, 16, known_valid=True, uniform=True)
    with torch.no_grad():  # the pads are such that they would have been pivots
        unaware = pruned_by_hand(model, inputs, 16, 1, uniform=True)
    assert not torch.allclose(outputs[-1], unaware[-1])


def test_fill_that_hides_nothing() -> None:
    model = Masked(lambda s, seen: s.masked_fill(~seen, 0.0).softmax(-1))
    assert_pruned(model, padded(), 16)


UNCLEAR: dict[str, Weigh] = {
    "added by a factor": lambda s, seen: torch.add(s, (~seen).float(), alpha=-1e9).softmax(-1),
    "after the softmax": lambda s, seen: F.normalize(s.softmax(-1) * seen, p=1.0, dim=-1),
    "filled after it": lambda s, seen: s.softmax(-1).masked_fill(~seen, 0.0),
    "multiplied": lambda s, seen: (s * seen + (~seen).float() * -1e9).softmax(-1),
    "beside other scores": lambda s, seen: (s + s @ s.mT + (~seen) * -1e9).softmax(-1),
}


@pytest.mark.parametrize("weigh", UNCLEAR.values(), ids=UNCLEAR)
def test_mask_that_is_not_understood(weigh: Weigh) -> None:
    assert_declined(Masked(weigh), padded(), "combined with a tensor", retain_tokens=16)


# --- rows picked by a mask and put back between layers ------------------------------------------

# x [B, S, D], mask [B, S], feature rows [N, D] -> x
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


class DeepFeatures(Decoder):
    """Adds vision features at their positions after every layer but the last."""

    def __init__(self, change: Change) -> None:
        super().__init__(THREE)
        self.change = change

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x, vision = self.merge(ids, features)
        x, outputs = self.run_layers(range(2), x, vision, features)
        x, k, v = self.layers[2](x, Context())
        return self.finish(x, [*outputs, k, v], [])

    def run_layers(
        self, indices: range, x: Tensor, vision: Tensor, features: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for index in indices:
            x, k, v = self.layers[index](x, Context())
            outputs += [k, v]
            x = self.change(x, vision, features)
        return x, outputs

    def by_hand(self, inputs: Inputs, retain: int) -> Any:
        """The outputs, with tokens dropped before layer 1."""
        x, vision = self.merge(inputs["ids"], inputs["features"])
        x, before = self.run_layers(range(1), x, vision, inputs["features"])
        rows = inputs["features"].shape[0]
        keep = by_operator(self.norm(x), before[0], vision, None, rows, retain)[0]
        features = inputs["features"][(vision.cumsum(1) - 1)[:, keep][vision[:, keep]]]
        x, after = self.run_layers(range(1, 2), x[:, keep], vision[:, keep], features)
        x, k, v = self.layers[2](x, Context())
        return self.finish(x, [*before, *after, k, v], [])


def put_back(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return x.index_put((mask,), rows)


def other_half_doubled(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    picked = x[mask]
    x[..., :8].mul_(2)
    return put_back(x, mask, picked + rows)


def doubled_in_place(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    picked = x[mask]
    picked.mul_(2)
    return put_back(x, mask, picked + rows)


def changed_before_put_back(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    y, picked = x * 1.0, x[mask]
    x = x.mul_(2)
    return put_back(y + x, mask, picked + rows)


ROWS: dict[str, tuple[bool, Change]] = {
    "sum": (True, lambda x, m, f: put_back(x, m, x[m] + f)),
    "over their number": (True, lambda x, m, f: put_back(x, m, x[m] + f / x[m].shape[0] * 0)),
    "converted": (True, lambda x, m, f: put_back(x, m, (x[m].double() + f.double()).float())),
    "weighed": (True, lambda x, m, f: put_back(x, m, x[m] + f.mean(-1, keepdim=True))),
    "of features turned": (True, lambda x, m, f: put_back(x, m, x[m] + f.flip(-1))),
    "half of all changed": (False, other_half_doubled),
    "changed in place": (False, doubled_in_place),
    "all changed": (False, changed_before_put_back),
}


@pytest.mark.parametrize(("prunes", "change"), ROWS.values(), ids=ROWS)
def test_rows_put_back(prunes: bool, change: Change) -> None:
    model, inputs = DeepFeatures(change).eval(), prompt(THREE)
    if not prunes:
        assert_declined(model, inputs, "aten.index.Tensor")
        return
    with torch.no_grad():
        outputs = compiled(model, retain_tokens=5, layer=1)(**inputs)
        assert isinstance(dartfx.reports()[-1].outcome, Pruned)
        assert_same(outputs, model.by_hand(inputs, 5))


def root_of_rows(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """No root of the other tokens exists, so neither may its gradient be asked for."""
    x = torch.where(mask.unsqueeze(-1), x.abs() + 1, -x.abs() - 1)
    return put_back(x, mask, x[mask].sqrt() + rows)


def test_gradients_of_rows_put_back() -> None:
    model, inputs = DeepFeatures(root_of_rows).eval(), prompt(THREE)
    outputs = compiled(model, retain_tokens=5, layer=1)(**inputs)
    assert isinstance(dartfx.reports()[-1].outcome, Declined)
    outputs[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.layers[0].parameters() if p.grad is not None)


# --- a table [S, 1, Dh], whose size-1 dim stands for the heads ----------------------------------


class TokensFirstRope(Attention):
    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin, scale = (context.tensors[n] for n in ("cos", "sin", "scale"))
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) * scale
        return self.o(JOINS["reshape"](y)), k, v


class TokensFirst(Decoder):
    """One [1, 1, 1] parameter scales the embeddings [B, S, D] and attention's [B, H, S, Dh]."""

    def __init__(self, z: Sizes) -> None:
        super().__init__(z)
        self.scale = nn.Parameter(torch.full((1, 1, 1), 1.1))
        for layer in self.layers:
            layer.attn = TokensFirstRope(z, Style())

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x, vision = super().merge(ids, features)
        return x * self.scale, vision

    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        context = Context()
        step = 10.0 ** -(torch.arange(self.z.head_dim) // 2)
        angle = torch.arange(x.shape[1]).view(-1, 1, 1) * step
        context.add("cos", angle.cos(), 0)
        context.add("sin", angle.sin(), 0)
        context.add("scale", self.scale)
        return context


def test_heads_of_a_table_are_not_taken_for_the_batch() -> None:
    z = Sizes(batch=2, heads=2, kv_heads=2, layers=2)
    inputs = prompt(z)
    inputs["ids"][1, 2 : 4 + z.vision], inputs["ids"][1, 8 : 8 + z.vision] = 5, IMAGE
    assert_declined(TokensFirst(z), inputs, "no batch dim")
    one = Sizes(layers=2)
    assert_pruned(TokensFirst(one), prompt(one))
