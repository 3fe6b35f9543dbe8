"""Decoders built to provoke silent wrong pruning: each is pruned as by hand, or declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dartfx
from dartfx.passes.frontend.canonicalise import canonicalise
from dartfx.passes.graph import packet
from dartfx.passes.outcome import Unchanged
from tests.support.plain.decoders import (
    IMAGE,
    Decoder,
    Inputs,
    Layer,
    Sizes,
    Style,
    assert_same,
    changed,
    prompt,
)
from tests.support.plain.refusals import RETAIN, SMALL, assert_declined, assert_pruned
from tests.support.plain.spellings import Context

TWO_ROWS = Sizes(layers=2, batch=2)
THREE = Sizes(layers=3)


def uneven(z: Sizes) -> Inputs:
    """Two rows with their vision tokens at different places."""
    inputs = prompt(z)
    ids = torch.randint(2, z.vocab, (2, z.seq))
    ids[0, 2 : 2 + z.vision], ids[1, 8 : 8 + z.vision] = IMAGE, IMAGE
    return inputs | {"ids": ids}


# --- the order of tokens and rows between the merge and the cut ---------------------------------


class Reordered(Decoder):
    """Embeddings change places after vision features were merged into them."""

    def __init__(self, z: Sizes, reorder: Callable[[Tensor], Tensor]) -> None:
        super().__init__(z)
        self.reorder = reorder

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x, vision = super().merge(ids, features)
        return self.reorder(x), self.reorder(vision)


REORDERS: dict[str, tuple[Sizes, Callable[[Tensor], Tensor]]] = {
    "flip of tokens": (SMALL, lambda x: x.flip(1)),
    "roll of tokens": (SMALL, lambda x: x.roll(3, 1)),
    "tokens by index": (SMALL, lambda x: x[:, torch.arange(23, -1, -1)]),
    "flip of rows": (TWO_ROWS, lambda x: x.flip(0)),
    "roll of rows": (TWO_ROWS, lambda x: x.roll(1, 0)),
    "rows by index": (TWO_ROWS, lambda x: x[torch.tensor([1, 0])]),
    "rows selected": (TWO_ROWS, lambda x: x.index_select(0, torch.tensor([1, 0]))),
}


@pytest.mark.parametrize(("z", "reorder"), REORDERS.values(), ids=REORDERS)
def test_mask_of_another_order(z: Sizes, reorder: Callable[[Tensor], Tensor]) -> None:
    inputs = prompt(z) if z.batch == 1 else uneven(z)
    assert_declined(Reordered(z, reorder), inputs, "do not reach the cut")


class Broken(Decoder):
    """Rows change places in the graph that merges, before the graph of the layers."""

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x = self.merge(ids, features)[0].flip(0)
        torch._dynamo.graph_break()
        outputs: list[Tensor] = []
        for layer in self.layers:
            x, k, v = layer(x, Context())
            outputs += [k, v]
        return self.finish(x, outputs, [])


def test_mask_of_another_order_is_not_returned() -> None:
    model, inputs = Broken(TWO_ROWS).eval(), uneven(TWO_ROWS)
    options = {"lowering": "eager", "retain_tokens": RETAIN, "layer": 1}
    with torch.no_grad():
        outputs = torch.compile(model, backend="dart", options=options)(**inputs)
        assert_same(outputs, model(**inputs), rtol=0, atol=0)
    assert isinstance(last := dartfx.reports()[-1].outcome, Unchanged)
    assert last.unsure


def in_halves(layer: Layer, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :8], y[..., 8:] = x[..., :8] * 2, x[..., 8:]
    return y


def test_written_into_a_buffer_is_the_same_order() -> None:
    assert_pruned(Decoder(SMALL, layer=changed(in_halves)), prompt(SMALL))


# --- rows put in the order of a sort ------------------------------------------------------------


class Sorted(Layer):
    """Tokens sorted by a channel, with rows of a table next to each ``times`` copies of a token."""

    times = 1

    def positional(self, x: Tensor, context: Context) -> Tensor:
        table = self.table[: x.shape[1]] if context.keep is None else self.table[context.keep[0]]
        order = x[0, :, : self.times].reshape(-1).argsort()
        token = order // self.times if self.times > 1 else order
        y = (x[0][token] + table[token])[order.argsort()]
        return y.unflatten(0, (-1, self.times)).sum(1).unsqueeze(0)


class SortedTwice(Sorted):
    times = 2


@pytest.mark.parametrize("layer", [Sorted, SortedTwice])
def test_table_next_to_sorted_rows(layer: type[Layer]) -> None:
    assert_declined(Decoder(SMALL, layer=layer), prompt(SMALL), "aten.index.Tensor")


INVERSES: dict[str, tuple[bool, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "as it should be": (True, lambda n: (torch.zeros(6, dtype=torch.long), n)),
    "longer": (False, lambda n: (torch.zeros(9, dtype=torch.long), n)),
    "of floats": (False, lambda n: (torch.zeros(6), n.float())),
    "of int32": (False, lambda n: (torch.zeros(6, dtype=torch.int32), n.int())),
    "of rows": (False, lambda n: (torch.zeros(6, 6, dtype=torch.long), n)),
}


@pytest.mark.parametrize(("rewritten", "parts"), INVERSES.values(), ids=INVERSES)
def test_inverse_permutation(
    rewritten: bool, parts: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    def inverse(x: Tensor) -> Tensor:
        target, values = parts(torch.arange(6))
        return target.index_put((x.argsort(),), values)

    x = torch.rand(6)
    module = make_fx(inverse, tracing_mode="fake", pre_dispatch=True)(x)
    canonicalise(module.graph)
    module.recompile()
    writes = [n for n in module.graph.nodes if packet(n) is torch.ops.aten.index_put]
    assert (not writes) == rewritten
    assert_same(module(x), inverse(x), rtol=0, atol=0)
    assert module(x).dtype == inverse(x).dtype


# --- what is written to a value that crosses the cut --------------------------------------------


class Biased(Decoder):
    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        context = super().context(x, valid)
        rows = torch.arange(x.shape[1]).view(1, -1, 1) / 10
        context.add("bias", rows + torch.arange(self.z.hidden) % 3, 1)
        return context


def decaying(part: Callable[[Tensor], Tensor]) -> type[Layer]:
    """A layer that adds a bias and then changes a part of it for the next layer."""

    class Decaying(Layer):
        def positional(self, x: Tensor, context: Context) -> Tensor:
            bias = context.tensors["bias"]
            x = x + bias
            part(bias).mul_(0.5)
            return x

    return Decaying


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[..., :4],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "unbind": lambda x: x.unbind(-1)[1],
    "transposed": lambda x: x.mT[:, 3],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_written_between_two_layers_after_the_cut(part: Callable[[Tensor], Tensor]) -> None:
    model, inputs = Biased(THREE, layer=decaying(part)), prompt(THREE)
    assert_pruned(model, inputs)


def writing(index: tuple[Any, ...], value: Callable[[Tensor], Any]) -> type[Layer]:
    """A layer whose input is written to by index."""

    def write(_: Layer, x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value(x)
        return x

    return changed(write)


CHANNELS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: 0.5,
    "of each token": lambda x: x[..., :2] * 2,
}


@pytest.mark.parametrize("value", CHANNELS.values(), ids=CHANNELS)
def test_written_to_channels_by_index(value: Callable[[Tensor], Any]) -> None:
    layer = writing((slice(None), slice(None), [3, 1]), value)
    assert_pruned(Decoder(THREE, layer=layer), prompt(THREE))


def test_written_to_tokens_by_index() -> None:
    model = Decoder(SMALL, layer=writing((slice(None), [3, 1]), lambda x: 0.5))
    assert_declined(model, prompt(SMALL), "reads the token axis")


class Recording(Layer):
    """Keeps its input in a buffer of rows."""

    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__(z, style)
        self.register_buffer("seen", torch.zeros(z.batch * z.seq, z.hidden))

    def positional(self, x: Tensor, context: Context) -> Tensor:
        self.seen.copy_(x.reshape(-1, x.shape[-1]))
        return x


@pytest.mark.parametrize("z", [SMALL, TWO_ROWS], ids=["one row", "two rows"])
def test_buffer_of_rows_is_written(z: Sizes) -> None:
    model = Decoder(z, layer=Recording)
    assert_declined(model, prompt(z), "writes in place to a value from before it")
    assert model.layers[1].seen.abs().sum() > 0


# --- weights along the token axis ----------------------------------------------------------------


class Mixing(Layer):
    """Token positions are mixed by a parameter [S, S], as MLP-Mixer does."""

    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__(z, style)
        self.weight = nn.Parameter(torch.randn(z.seq, z.seq) / 9)


MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda w, x: F.linear(x.mT, w).mT,
    "matmul": lambda w, x: w @ x,
    "transposed": lambda w, x: (x.mT @ w.t()).mT,
    "a part": lambda w, x: w[: x.shape[1], : x.shape[1]] @ x,
    "converted": lambda w, x: (w.double() @ x.double()).float(),
    "einsum": lambda w, x: torch.einsum("st,btd->bsd", w, x),
    "pooled": lambda w, x: torch.einsum("st,btd->bd", w, x).unsqueeze(1),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_weights_of_positions(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Mixed(Mixing):
        def positional(self, x: Tensor, context: Context) -> Tensor:
            return x + mix(self.weight, x)

    assert_declined(Decoder(SMALL, layer=Mixed), prompt(SMALL), "reads the token axis")
