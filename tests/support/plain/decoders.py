"""Small decoders in plain torch, and the same decoders pruned by hand.

Each embeds ids, scatters vision features over them, and runs layers of attention and MLP.
``pruned_by_hand`` is the same forward with the tokens dropped before layer K by explicit indexing
of every value whose token dims the decoder itself names; it shares no code with the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import dartfx
from dartfx.passes.outcome import Outcome
from tests.support.plain.spellings import Attention, Context, Mlp, Sizes, Style, make_norm

IMAGE = 1
Inputs = dict[str, Tensor]


class Layer(nn.Module):
    """Attention and MLP with residuals; ``extra`` of the style adds something per position."""

    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__()
        self.style = style
        self.norm1, self.norm2 = make_norm(z, style), make_norm(z, style)
        self.attn, self.mlp = Attention(z, style), Mlp(z, style)
        self.table = nn.Parameter(torch.randn(z.seq + 3, z.hidden) * 0.1)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.attn(self.norm1(self.positional(x, context)), context)
        x = x + y
        return x + self.mlp(self.norm2(x)), k, v

    def positional(self, x: Tensor, context: Context) -> Tensor:
        """``x`` with the style's per-layer positional bias."""
        keep, length = context.keep, x.shape[1]
        if self.style.extra == "arange":
            places = torch.arange(length) if keep is None else keep
            return x + places.reshape(-1, length, 1) / 100
        if self.style.extra == "table":
            rows = self.table[:length] if keep is None else self.table[keep]
            return x + rows
        if self.style.extra == "residual":
            return x + context.tensors["first"]
        return x


def changed(change: Callable[[Layer, Tensor], Tensor]) -> type[Layer]:
    """A layer whose input goes through ``change(layer, x)`` first."""

    class Changed(Layer):
        def positional(self, x: Tensor, context: Context) -> Tensor:
            return change(self, x)

    return Changed


class Decoder(nn.Module):
    """ids [B, S], features [N_total, D] -> (logits, keys and values of every layer, ...)."""

    def __init__(
        self, z: Sizes | None = None, style: Style | None = None, layer: type[Layer] = Layer
    ) -> None:
        super().__init__()
        self.z, self.style = z or Sizes(), style or Style()
        self.embed = nn.Embedding(self.z.vocab, self.z.hidden)
        self.layers = nn.ModuleList(layer(self.z, self.style) for _ in range(self.z.layers))
        self.norm = make_norm(self.z, self.style)
        self.head = nn.Linear(self.z.hidden, self.z.vocab, bias=False)

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x, _ = self.merge(ids, features)
        context, outputs, hidden = self.context(x, valid), [], [x]
        for layer in self.layers:
            x, k, v = layer(x, context)
            outputs += [k, v]
            hidden.append(x)
        return self.finish(x, outputs, hidden)

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids == IMAGE
        x = self.embed(ids)
        return x.masked_scatter(vision.unsqueeze(-1), features), vision

    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        shown = hidden if self.style.extra == "hidden" else []
        return (self.head(self.norm(x)), *outputs, *shown)

    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        """Rotary tables and mask in the style's shapes, with their token dims."""
        context = Context()
        length = x.shape[1]
        if self.style.rope != "none":
            rows = x.shape[0] if self.style.rope == "batched" else 1
            positions = torch.arange(length)
            if self.style.rope != "flat":
                positions = positions[None].expand(rows, length)
            step = 10.0 ** -torch.arange(0, self.z.head_dim, 2)
            angle = positions[..., None] * step
            angle = torch.cat([angle, angle], dim=-1)
            at = 0 if self.style.rope == "flat" else 1
            context.add("cos", angle.cos(), at)
            context.add("sin", angle.sin(), at)
        if self.style.mask != "none":
            self.add_mask(context, x, valid)
        if self.style.extra == "residual":
            context.add("first", x * 0.5, 1)
        return context

    def add_mask(self, context: Context, x: Tensor, valid: Tensor | None) -> None:
        length = x.shape[1]
        form, kind = self.style.mask.split("_")
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if form == "4d":
            mask = mask[None, None].expand(x.shape[0], 1, length, length)
            if valid is not None:
                mask = mask & valid[:, None, None, :]
        elif form == "3d":
            mask = mask[None]
        if kind == "float":
            low = torch.finfo(x.dtype).min
            mask = torch.zeros(mask.shape).masked_fill(~mask, low)
        context.add("mask", mask, mask.ndim - 2, mask.ndim - 1)


class Halves(Decoder):
    """A decoder whose merge dynamo compiles apart from its layers."""

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x, _ = self.merge(ids, features)
        torch._dynamo.graph_break()
        context, outputs = self.context(x, valid), []
        for layer in self.layers:
            x, k, v = layer(x, context)
            outputs += [k, v]
        return self.finish(x, outputs, [])


# final-normed hidden, keys, vision, valid (or None), N, R -> kept positions [B, S']
Select = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int], Tensor]


def by_operator(
    hidden: Tensor, keys: Tensor, vision: Tensor, valid: Tensor | None, per_row: int, retain: int
) -> Tensor:
    """What the operator selects with the default options."""
    selected: Tensor = torch.ops.dartfx.select_tokens(
        hidden, keys, vision, valid, per_row, retain, 4, 4, "dart", "auto"
    )
    return selected


def pruned_by_hand(
    model: Decoder,
    inputs: Inputs,
    retain: int,
    layer: int = 2,
    *,
    known_valid: bool = False,
    uniform: bool = False,
    select: Select = by_operator,
) -> Any:
    """The model's outputs with ``retain`` vision tokens kept from decoder layer ``layer`` on.

    known_valid: whether the mask of the layer before the cut tells which tokens are valid;
    uniform: whether the caches of the layers before the cut are trimmed, too.  From the cut on
    every row runs by itself, so a value shared by the rows needs no batch dim to be pruned.
    """
    valid = inputs.get("valid")
    x, vision = model.merge(inputs["ids"], inputs["features"])
    context, outputs, hidden = model.context(x, valid), [], [x]
    for block in model.layers[:layer]:
        x, k, v = block(x, context)
        outputs += [k, v]
        hidden.append(x)
    if known_valid and valid is None:
        valid = torch.ones_like(vision)
    per_row = inputs["features"].numel() // model.z.hidden // x.shape[0]
    keep = select(
        model.norm(x), outputs[-2], vision, valid if known_valid else None, per_row, retain
    )
    if uniform:
        outputs = [_kept(cache, keep) for cache in outputs]
    for kept, k, v in _behind_cut(model, x, context, keep, layer):
        outputs += [k, v]
        hidden.append(kept)
    return model.finish(hidden[-1], outputs, hidden)


def _behind_cut(
    model: Decoder, x: Tensor, context: Any, keep: Tensor, layer: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, keys and values of each layer from ``layer`` on, computed row by row."""
    after: list[list[Tensor]] = []
    for index in range(x.shape[0]):
        row = x[index : index + 1].index_select(1, keep[index])
        kept, found = context.row(index, keep[index : index + 1]), []
        for block in model.layers[layer:]:
            row, k, v = block(row, kept)
            found += [row, k, v]
        after.append(found)
    joined = [torch.cat(values) for values in zip(*after, strict=True)]
    return zip(joined[::3], joined[1::3], joined[2::3], strict=True)


def _kept(cache: Tensor, keep: Tensor) -> Tensor:
    """A cache [B, H, S, Dh] at each row's kept positions [B, S']."""
    return torch.stack([c.index_select(1, k) for c, k in zip(cache, keep, strict=True)])


def prompt(z: Sizes, pads: tuple[int, ...] = ()) -> Inputs:
    """Random ids with ``z.vision`` image tokens per row after two of text, and their features.

    pads: left pads of each row; then a ``valid`` mask comes with it.
    """
    ids = torch.randint(2, z.vocab, (z.batch, z.seq))
    valid = torch.ones(z.batch, z.seq, dtype=torch.bool)
    for row in range(z.batch):
        start = (pads[row] if pads else 0) + 2
        ids[row, start : start + z.vision] = IMAGE
        valid[row, : start - 2] = False
    inputs = {"ids": ids, "features": torch.randn(z.batch * z.vision, z.hidden)}
    return {**inputs, "valid": valid} if pads else inputs


def compiled(model: nn.Module, *, dynamic: bool | None = None, **options: object) -> Any:
    """The model compiled by the dart backend, without Inductor."""
    return torch.compile(
        model,
        backend="dart",
        fullgraph=True,
        dynamic=dynamic,
        options={"lowering": "eager", "on_unsupported": "ignore"} | options,
    )


def run(
    model: nn.Module, inputs: Inputs, *, dynamic: bool | None = None, **options: object
) -> tuple[Any, Outcome]:
    """Compile with the dart backend, call once; the outputs and what became of the last graph."""
    with torch.no_grad():
        outputs = compiled(model, dynamic=dynamic, **options)(**inputs)
    return outputs, dartfx.reports()[-1].outcome


def flat(outputs: Any) -> Iterator[Tensor]:
    """The tensors of nested outputs, in order."""
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return iter(leaves)


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Equal shapes and values, by default to 1e-5."""
    first, second = list(flat(one)), list(flat(other))
    assert [t.shape for t in first] == [t.shape for t in second]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


__all__ = ["IMAGE", "Decoder", "Halves", "Inputs", "Layer", "Sizes", "Style", "assert_same",
           "changed", "compiled", "flat", "prompt", "pruned_by_hand", "replace", "run"]  # fmt: skip
