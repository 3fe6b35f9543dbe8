"""Random decoders and prompts: the strategies behind test_properties.py.

A :class:`Plan` fully determines one example.  Each part of the decoder draws its variant
independently, and many sizes are drawn to coincide with the sequence length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.plain.decoders import IMAGE, Decoder, Inputs
from tests.support.plain.random_attention import (
    EQUAL_HEADS,
    LOW,
    MASKINGS,
    PRODUCTS,
    PROJECTIONS,
    REPEATS,
    ROTATIONS,
    WEIGHS,
    LayerStyle,
)
from tests.support.plain.random_layers import (
    EXTRAS,
    MERGES,
    NORMS,
    RANDOM_MLPS,
    RESIDUALS,
    RandomLayer,
)
from tests.support.plain.spellings import JOINS, Context, Sizes


@dataclass(frozen=True)
class Plan:
    """One example: a decoder, a prompt and what is asked of the backend.

    pads: (left, right) of each row, or () for no ``valid`` input; counts: vision tokens of each
    row; starts: where a row's vision tokens start after its left pads, None to scatter them.
    """

    z: Sizes
    layers: tuple[LayerStyle, ...]
    cut: int = 1
    norm: str = "layer"
    merge: str = "scatter"
    norm_first: bool = False
    positions: str = "rows"
    rope: str = "none"
    mask: str = "none"
    finish: str = "all"
    caches: bool = True
    hidden: bool = False
    kv_layout: str = "auto"
    retain: int = 3
    pads: tuple[tuple[int, int], ...] = ()
    counts: tuple[int, ...] = (6,)
    starts: tuple[int | None, ...] = (2,)
    dynamic: bool = False
    seed: int = 0


class RandomDecoder(Decoder):
    """The decoder of one plan: ids [B, S], features [N_total, D], valid [B, S] or None."""

    layers: nn.ModuleList

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.z, layer=lambda *_: nn.Identity())  # type: ignore[arg-type]
        self.plan = plan
        own = {"mask"} if plan.mask in ("own", "keys") else set()
        own |= {"positions"} if plan.rope == "own" else set()
        self.layers = nn.ModuleList(RandomLayer(plan.z, s, plan.norm, own) for s in plan.layers)
        self.norm = NORMS[plan.norm](plan.z.hidden)
        self.angles = nn.Parameter(self.angle(torch.arange(plan.z.seq + 9)))

    def angle(self, positions: Tensor) -> Tensor:
        return positions.unsqueeze(-1) * 10.0 ** -torch.arange(0, self.z.head_dim, 2)

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids == IMAGE
        x = MERGES[self.plan.merge](self.embed(ids), vision, features)
        return (self.norm(x) if self.plan.norm_first else x), vision

    def context(self, x: Tensor, valid: Tensor | None) -> Context:
        context, plan = Context(), self.plan
        if plan.rope not in ("none", "own"):
            self.add_positions(context, x, valid)
        if plan.mask == "keys" and valid is not None:
            context.add("valid", valid, 1)
        elif plan.mask not in ("none", "own", "keys"):
            self.add_masks(context, x, valid)
        if any(layer.extra == "first" for layer in plan.layers):
            context.add("first", x * 0.5, 1)
        return context

    def add_positions(self, context: Context, x: Tensor, valid: Tensor | None) -> None:
        """Positions or their angles as [S, ...], [1, S, ...] or [B, S, ...]."""
        positions = torch.arange(x.shape[1])
        if self.plan.positions == "one_row":
            positions = positions.unsqueeze(0)
        elif self.plan.positions == "rows":
            positions = positions.expand(x.shape[0], -1)
        elif self.plan.positions == "counted":
            here = torch.ones(x.shape[:2], dtype=torch.long) if valid is None else valid.long()
            positions = (here.cumsum(-1) - 1).clamp(min=0)
        at = positions.ndim - 1
        if self.plan.rope == "positions":
            context.add("positions", positions, at)
        elif self.plan.rope == "lookup":
            context.add("angle", self.angles[positions], at)
        elif self.plan.rope == "embedding":
            context.add("angle", nn.functional.embedding(positions, self.angles), at)
        else:
            context.add("angle", self.angle(positions), at)

    def add_masks(self, context: Context, x: Tensor, valid: Tensor | None) -> None:
        """A full and a sliding mask of the plan's form: rank and batch, then kind."""
        form, kind = self.plan.mask.split("_")
        places = torch.arange(x.shape[1])
        ahead = places[None, :] - places[:, None]
        for name, mask in (("mask", ahead <= 0), ("window", (ahead <= 0) & (ahead > -5))):
            if form in ("rows3", "rows", "heads"):
                mask = mask.expand(x.shape[0], *mask.shape)
                mask = mask if valid is None else mask & valid[:, None, :]
            elif form in ("one3", "one"):
                mask = mask[None]
            if form in ("rows", "one", "heads"):
                mask = mask.unsqueeze(1)
            if form == "heads":
                mask = mask.expand(-1, self.z.heads, -1, -1)
            if kind == "float":
                mask = torch.zeros(mask.shape).masked_fill(~mask, LOW)
            elif kind == "written":  # in place, as transformers' own masks were for long
                hidden, mask = ~mask, torch.zeros(mask.shape)
                mask[..., : x.shape[1]] = mask[..., : x.shape[1]].masked_fill(hidden, LOW)
            elif kind == "bias":
                slope = 0.5 ** torch.arange(1, self.z.heads + 1)
                bias = slope[:, None, None] * ahead
                mask = torch.where(mask, bias if mask.ndim > 3 else bias[:1], LOW)
            context.add(name, mask, mask.ndim - 2, mask.ndim - 1)

    def finish(self, x: Tensor, outputs: list[Tensor], hidden: list[Tensor]) -> Any:
        x = self.norm(x)
        if self.plan.finish == "last":
            x = x[:, -1]
        elif self.plan.finish == "last_slice":
            x = x[:, -1:, :]
        elif self.plan.finish == "last_two":
            x = x[:, slice(-2, None)]
        logits = self.head(x).float()
        shown = list(hidden) if self.plan.hidden else []
        return (logits, *(outputs if self.plan.caches else []), *shown)


POSITIONS = ("flat", "one_row", "rows", "counted")
ROPES = ("own", "none", "angle", "positions", "lookup", "embedding")
FINISHES = ("all", "last", "last_slice", "last_two")
PADDED = ("keys", "rows3_bool", "rows_bool", "rows_float", "heads_bool", "rows_bias",
          "rows_written")  # fmt: skip
MASKS = (*PADDED, "own", "flat_bool", "flat_float", "one3_bool", "one_bool", "one_float")
# What the passes leave alone today, always or at a batch above one.
SELDOM = {"scattered_experts", "onto_x", "own", "one3_bool"}


def prompt_of(plan: Plan, longer: int = 0) -> Inputs:
    """Ids with each row's vision tokens, their features, and ``valid`` where the plan pads.

    longer: so many text tokens more at the end, and a vision token more in every row.
    """
    z, more = plan.z, min(longer, 1)
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(2, z.vocab, (z.batch, z.seq + longer), generator=generator)
    valid = torch.ones_like(ids, dtype=torch.bool)
    for row, (count, start) in enumerate(zip(plan.counts, plan.starts, strict=True)):
        left, right = plan.pads[row] if plan.pads else (0, 0)
        room = z.seq - left - right + longer
        valid[row, :left], valid[row, left + room :] = False, False
        places = torch.randperm(room, generator=generator) if start is None else None
        if places is None:
            places = torch.arange(start, start + count + more)
        ids[row, left + places[: count + more]] = IMAGE
    rows = sum(plan.counts) + more * z.batch
    inputs = {"ids": ids, "features": torch.randn(rows, z.hidden, generator=generator)}
    return {**inputs, "valid": valid} if plan.pads else inputs


# --- drawing one example --------------------------------------------------------------------


def sizes_of(rng: Random) -> Sizes:
    """Small sizes, of which about every third is the sequence length where it may be."""
    seq = rng.randint(12, 18)
    even = seq if seq % 2 == 0 else 4
    groups, kv_heads = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 2, 3))
    if rng.random() < 0.12 and seq % groups == 0:
        kv_heads = seq // groups
    return Sizes(
        batch=rng.choice((1, 2, 3)),
        seq=seq,
        hidden=rng.choice((8, 10, seq)),
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=rng.choice((4, 8, even)),
        inner=rng.choice((6, 8, 2 * seq, even)),
        vocab=rng.choice((20, 30, seq)),
    )


def one_of(rng: Random, names: Iterable[str]) -> str:
    """Any of the names, each of ``SELDOM`` a twelfth as often as the others."""
    names = list(names)
    return rng.choices(names, [1 if n in SELDOM else 12 for n in names])[0]


def layer_of(rng: Random, z: Sizes, mask: str, share: bool) -> LayerStyle:
    """One layer, every part of which is drawn on its own."""
    equal = z.heads == z.kv_heads
    attend = rng.choice(("sdpa", "softmax", "float32")) if mask != "none" else "sdpa"
    extra = one_of(rng, EXTRAS if z.batch == 1 else EXTRAS[1:]) if rng.random() < 0.4 else "none"
    return LayerStyle(
        split=one_of(rng, (n for n in PROJECTIONS if equal or n not in EQUAL_HEADS)),
        rotate=one_of(rng, ROTATIONS),
        seq_first=rng.random() < 0.3,
        repeat=one_of(rng, [*REPEATS, "gqa"] if attend == "sdpa" else REPEATS),
        attend=attend,
        product=one_of(rng, PRODUCTS),
        masking=one_of(rng, MASKINGS),
        weigh=one_of(rng, WEIGHS),
        crop=rng.random() < 0.3,
        window="_" in mask and rng.random() < 0.3,
        share=share and rng.random() < 0.5,
        join=one_of(rng, JOINS),
        mlp=one_of(rng, RANDOM_MLPS),
        residual=one_of(rng, RESIDUALS),
        extra=extra,
    )


def rows_of(rng: Random, z: Sizes) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """Pads in front of and behind every row, () without a mask, and vision tokens by row."""
    most = z.seq - 4
    pads: tuple[tuple[int, int], ...] = ()
    if rng.random() < 0.5:
        pads = tuple(rng.choice(((0, 0), (3, 0), (0, 2))) for _ in range(z.batch))
        most -= 3
    count = rng.randint(2, most)
    counts = [count] * z.batch
    if rng.random() < 0.15:  # rows that do not hold as many as others
        counts = [rng.randint(0, count) for _ in counts]
        counts[0] = count
    if sum(counts) < z.batch:  # rounded down, not one token per row
        counts = [count] * z.batch
    return pads, counts


def plan_of(rng: Random) -> Plan:
    """One example: sizes, every layer, what surrounds them, and a prompt."""
    z = sizes_of(rng)
    mask = one_of(rng, MASKS) if rng.random() < 0.7 else "none"
    depth = rng.choice((2, 2, 3))
    cut, share = rng.randint(1, depth - 1), rng.random() < 0.15
    pads, counts = rows_of(rng, z)
    # Without a batch dim, positions can be gathered for one row only.
    shared = z.batch == 1 or rng.random() < 0.1
    return Plan(
        z=z,
        # The layer before the cut attends with the keys that it returns: by hand they are ranked.
        layers=tuple(layer_of(rng, z, mask, share and i >= cut) for i in range(depth)),
        cut=cut,
        norm=one_of(rng, NORMS),
        merge=one_of(rng, MERGES),
        norm_first=rng.random() < 0.1,
        positions=one_of(rng, POSITIONS if shared else POSITIONS[1:]),
        rope=one_of(rng, ROPES if shared else ROPES[1:]),
        mask=mask,
        finish=one_of(rng, FINISHES),
        caches=rng.random() < 0.6,
        hidden=rng.random() < 0.3,
        kv_layout=rng.choice(("auto", "auto", "uniform", "layered" if z.batch == 1 else "auto")),
        retain=rng.randint(0, sum(counts) // z.batch - 1),
        pads=pads,
        counts=tuple(counts),
        starts=tuple(rng.choice((0, 1, 2, None)) for _ in range(z.batch)),
        dynamic=rng.random() < 0.05,
        seed=rng.randrange(2**16),
    )


plans = st.randoms(use_true_random=True).map(plan_of)
