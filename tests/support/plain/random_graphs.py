"""Random modules without vision tokens that use a merge's operators in other roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.plain.decoders import Decoder, Layer
from tests.support.plain.spellings import Sizes, Style

Step = Callable[["Text", Tensor, Tensor, Tensor], Tensor]


def _zeroed(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = 0.0
    return x


def _one_row(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    x = x * 1.0
    x[mask] = m.row
    return x


def _slice_written(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:4] = x[:, 2:5] * 2
    return x


def _rows_written(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """``index_put`` of whole rows at counted places, as paged caches write them."""
    rows = torch.arange(x.shape[0]).unsqueeze(1)
    return x.index_put((rows, ids % x.shape[1]), x.flip(1) * 0.5)


def _accumulated(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    counts = torch.zeros(m.z.vocab).index_put((ids,), torch.ones(ids.shape), accumulate=True)
    return x + counts[ids].unsqueeze(-1) / 9


def _ids_scattered(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return x + m.embed(ids.masked_scatter(mask, ids.flip(1).contiguous()))


def _table_scattered(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    table = m.embed.weight.masked_scatter(m.embed.weight > 0.5, m.embed.weight.flip(0))
    return x + F.embedding(ids, table)


def _cache_scattered(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    heads = heads.masked_scatter(mask[:, None, :, None], heads.flip(2) * 2)
    return heads.transpose(1, 2).flatten(2)


def _scores_masked(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    scores = (x @ x.mT).masked_fill(mask[:, None], -1e9)
    return x + scores.softmax(-1) @ x


def _counted(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return x + m.embed(positions)


def _top_rows(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    best = x.norm(dim=-1).topk(3, dim=1)[1]
    return x + x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1])).mean(1, keepdim=True)


def _scattered(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    places = (ids % x.shape[1]).unsqueeze(-1).expand_as(x)
    return x + torch.zeros_like(x).scatter_add(1, places, x)


def _convolved(m: Text, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return x + F.avg_pool1d(x.mT, 3, stride=1, padding=1).mT


STEPS: dict[str, Step] = {
    "zeroed": _zeroed,
    "one row": _one_row,
    "slice written": _slice_written,
    "rows written": _rows_written,
    "accumulated": _accumulated,
    "ids scattered": _ids_scattered,
    "table scattered": _table_scattered,
    "cache scattered": _cache_scattered,
    "scores masked": _scores_masked,
    "counted": _counted,
    "top rows": _top_rows,
    "scattered": _scattered,
    "convolved": _convolved,
    "sorted": lambda m, x, ids, mask: x + x.sort(1)[0],
    "cumsum": lambda m, x, ids, mask: x + x.cumsum(1) / 9,
    "rolled": lambda m, x, ids, mask: x + x.roll(1, 1),
    "chosen": lambda m, x, ids, mask: torch.where(mask.unsqueeze(-1), x.flip(1), x),
}


@dataclass(frozen=True)
class TextPlan:
    """steps: before the layers and after them; layers: none, or a decoder stack's depth."""

    z: Sizes
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    style: Style = field(default_factory=Style)
    returns: str = "logits"
    dynamic: bool = False
    seed: int = 0


class Text(nn.Module):
    """ids [B, S], pads [B, S] -> logits and more; writes into ``seen`` [B, S + 4]."""

    def __init__(self, plan: TextPlan) -> None:
        super().__init__()
        self.plan, self.z = plan, plan.z
        self.embed = nn.Embedding(plan.z.vocab, plan.z.hidden)
        self.row = nn.Parameter(torch.randn(plan.z.hidden))
        self.layers = nn.ModuleList(Layer(plan.z, plan.style) for _ in range(plan.z.layers))
        self.norm = nn.LayerNorm(plan.z.hidden)
        self.head = nn.Linear(plan.z.hidden, plan.z.vocab)
        self.tables = Decoder(plan.z, plan.style).context

    def forward(self, ids: Tensor, pads: Tensor, seen: Tensor) -> Any:
        x, shown = self.embed(ids), []
        seen[:, : ids.shape[1]] += pads.to(seen.dtype)
        for name in self.plan.before:
            x = STEPS[name](self, x, ids, pads)
        context = self.tables(x, None)
        for layer in self.layers:
            x, k, v = layer(x, context)
            shown += [k, v]
        for name in self.plan.after:
            x = STEPS[name](self, x, ids, pads)
        logits = self.head(self.norm(x))
        if self.plan.returns == "logits":
            return logits
        if self.plan.returns == "caches":
            return logits, tuple(shown)
        return {"logits": logits[:, -1], "hidden": x}


def text_of(rng: Random) -> TextPlan:
    """One module; half of them hold a decoder stack, a few have dynamic shapes."""
    seq, heads = rng.randint(6, 12), rng.choice((1, 2))
    hidden = rng.choice((8, seq - seq % 2))
    mask = rng.choice(("none", "4d_bool"))
    return TextPlan(
        z=Sizes(
            batch=rng.choice((1, 2, seq)),
            seq=seq,
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=4,
            inner=6,
            vocab=rng.choice((20, 24)),
            layers=rng.choice((0, 0, 2)),
        ),
        before=tuple(rng.choice(list(STEPS)) for _ in range(rng.randint(0, 3))),
        after=tuple(rng.choice(list(STEPS)) for _ in range(rng.randint(1, 3))),
        style=Style(rope=rng.choice(("none", "one_row", "batched")), mask=mask),
        returns=rng.choice(("logits", "caches", "hidden")),
        dynamic=rng.random() < 0.1,
        seed=rng.randrange(2**16),
    )


def text_inputs(plan: TextPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, which of them are pads, and a buffer that the forward writes into."""
    shape = plan.z.batch, plan.z.seq
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(0, plan.z.vocab, shape, generator=generator)
    return ids, ids < 5, torch.zeros(shape[0], shape[1] + 4)


texts = st.randoms(use_true_random=True).map(text_of)
