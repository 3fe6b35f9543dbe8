"""Decoder layers and merges with a random variant of each part.

``HAZARDS`` are operations that read token positions, which a layer after the cut must not contain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.plain.random_attention import LayerStyle, RandomAttention
from tests.support.plain.spellings import MLPS, Context, Mlp, RMSNorm, Sizes, Style

EXPERTS = 4


# --- MLPs, with m.gate [D -> inner], m.down [inner -> D], m.experts and m.router --------------


def _routed(m: RandomMlp, flat: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = m.router(flat).softmax(-1).topk(2, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def _dense_experts(m: RandomMlp, x: Tensor) -> Tensor:
    flat = x.view(-1, x.shape[-1])
    every = torch.einsum("td,edf->tef", flat, m.experts)
    return (every * m.router(flat).softmax(-1).unsqueeze(-1)).sum(1).view_as(x)


def _one_hot_experts(m: RandomMlp, x: Tensor) -> Tensor:
    b, s, width = x.shape
    flat = x.reshape(b * s, width)
    weights, chosen = _routed(m, flat)
    share = (F.one_hot(chosen, EXPERTS) * weights.unsqueeze(-1)).sum(1)
    every = torch.stack([flat @ m.experts[e] for e in range(EXPERTS)], dim=1)
    return torch.einsum("te,tef->tf", share, every).reshape(b, s, width)


def _looped_experts(m: RandomMlp, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, chosen = _routed(m, flat)
    y = torch.zeros_like(flat)
    for e in range(EXPERTS):
        share = torch.where(chosen == e, weights, 0.0).sum(-1, keepdim=True)
        y += share * (flat @ m.experts[e])
    return y.unflatten(0, x.shape[:2])


def _scattered_experts(m: RandomMlp, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen = _routed(m, flat)
    share = torch.zeros(flat.shape[0], EXPERTS).scatter(1, chosen, weights)
    every = torch.bmm(flat.expand(EXPERTS, *flat.shape), m.experts)
    return (every * share.t().unsqueeze(-1)).sum(0).reshape(x.shape)


RANDOM_MLPS: dict[str, Callable[[RandomMlp, Tensor], Tensor]] = {
    **MLPS,
    "gated": lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
    "halved": lambda m, x: m.down(torch.cat([m.gate(x).tanh(), m.up(x)], -1).chunk(2, -1)[1]),
    "dense_experts": _dense_experts,
    "one_hot_experts": _one_hot_experts,
    "looped_experts": _looped_experts,
    "scattered_experts": _scattered_experts,
}


class RandomMlp(Mlp):
    def __init__(self, z: Sizes, name: str) -> None:
        super().__init__(z, Style())
        self.name = name
        self.up = nn.Linear(z.hidden, z.inner, bias=False)
        self.router = nn.Linear(z.hidden, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, z.hidden, z.hidden) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return RANDOM_MLPS[self.name](self, x)


# --- merges: embeddings [B, S, D], mask [B, S], features [N, D] -------------------------------


def _flat_index_put(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """InternVL's own code writes into the flattened embeddings."""
    shape = x.shape
    x = x.reshape(-1, shape[-1]).clone()
    x[mask.reshape(-1)] = features
    return x.reshape(shape)


def _in_place(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = features
    return x


def _in_place_scatter(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    return x.clone().masked_scatter_(mask[..., None], features)


def _from_zeros(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    wide = mask.unsqueeze(-1).expand_as(x)
    return torch.where(wide, torch.zeros_like(x).masked_scatter(wide, features), x)


MERGES = {
    "scatter": lambda x, m, f: x.masked_scatter(m.unsqueeze(-1), f),
    "scatter_wide": lambda x, m, f: x.masked_scatter(m.unsqueeze(-1).expand_as(x), f),
    "scatter_like": lambda x, m, f: torch.masked_scatter(x, m[..., None].tile(x.shape[-1]), f),
    "scatter_": _in_place_scatter,
    "from_zeros": _from_zeros,
    "in_place": _in_place,
    "index_put": lambda x, m, f: x.index_put((m,), f),
    "flat_index_put": _flat_index_put,
}  # fmt: skip


# --- norms ----------------------------------------------------------------------------------


class FunctionalNorm(RMSNorm):
    """``F.rms_norm`` with a weight that counts from zero, as Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1.0 + self.weight)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "by_hand": RMSNorm,
    "module": nn.RMSNorm,
    "functional": FunctionalNorm,
}


# --- what reads positions, and so must not come after the cut --------------------------------

HAZARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "roll": lambda x: x + 0.3 * x.roll(1, dims=1),
    "shift": lambda x: x + 0.3 * F.pad(x, (0, 0, 1, 0))[:, :-1],
    "token shift": lambda x: torch.cat([x[:, :1], x[:, 1:] + x[:, :-1]], dim=1),
    "flip": lambda x: x + 0.3 * x.flip(1),
    "cumsum": lambda x: x + x.cumsum(1) / 9,
    "first": lambda x: x + x[:, :1],
    "first of heads": lambda x: x + x.transpose(1, 2)[..., 0].unsqueeze(1),
    "middle": lambda x: x + x[:, x.shape[1] // 2].unsqueeze(1),
    "every other": lambda x: x + x[:, ::2].mean(1, keepdim=True),
    "windows": lambda x: x + x.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1),
    "halves": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "conv": lambda x: x + F.avg_pool1d(x.mT, 3, stride=1, padding=1).mT,
    "sort": lambda x: x + x.sort(dim=1)[0],
    "argsort": lambda x: x + x.argsort(dim=1) / 9,
    "diff": lambda x: x + x.diff(dim=1).sum(1, keepdim=True),
    "triangle": lambda x: x + (x @ x.mT).tril() @ x / 99,
    "flat roll": lambda x: x + 0.3 * x.flatten(0, 1).roll(1, 0).view(x.shape),
    "gather": lambda x: x + x.gather(1, torch.zeros_like(x, dtype=torch.long)),
    "index": lambda x: x + x[:, torch.arange(x.shape[1]) // 2],
    "swapped view": lambda x: x + x.mT.reshape(x.shape),
    "unfold": lambda x: x + x.unfold(1, 2, 2).mean(-1).mean(1, keepdim=True),
}


# --- one layer ------------------------------------------------------------------------------


class RandomLayer(nn.Module):
    """Attention and MLP with residuals; ``own`` as in :class:`RandomAttention`."""

    def __init__(self, z: Sizes, style: LayerStyle, norm: str, own: Collection[str]) -> None:
        super().__init__()
        self.style = style
        self.norm1, self.norm2 = NORMS[norm](z.hidden), NORMS[norm](z.hidden)
        self.attn, self.mlp = RandomAttention(z, style, own), RandomMlp(z, style.mlp)
        self.gate = nn.Linear(z.hidden, 1)
        self.table = nn.Parameter(torch.randn(z.seq + 9, z.hidden) * 0.1)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        x = HAZARDS[self.style.hazard](self.extra(x, context))
        y, k, v = self.attn(self.norm1(x), context)
        if context.get("shared_k") is None:  # for later layers without their own
            context.add("shared_k", k, 2)
            context.add("shared_v", v, 2)
        if self.style.residual == "parallel":
            return x + y + self.mlp(self.norm2(x)), k, v
        x = self.residual(x, y)
        return self.residual(x, self.mlp(self.norm2(x))), k, v

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        if self.style.residual == "gated":
            return x + self.gate(x).sigmoid() * y
        if self.style.residual == "scaled":
            return torch.add(y * 0.7, x, alpha=0.9)
        if self.style.residual == "sandwich":
            return x + self.norm2(y)
        if self.style.residual == "in_place":
            y += x
            return y
        if self.style.residual == "onto_x":
            x += y
            return x
        return x + y

    def extra(self, x: Tensor, context: Context) -> Tensor:
        """Something per position, from the layer itself or from the context."""
        kind, length, keep = self.style.extra, x.shape[1], context.keep
        if kind == "arange":
            places = torch.arange(length, device=x.device) if keep is None else keep[0]
            return x + places[None, :, None] / 100
        if kind == "arange_rows":
            places = torch.arange(length).expand(x.shape[0], length) if keep is None else keep
            return x + places.unsqueeze(-1).to(x.dtype) / 100
        if kind == "table":
            return x + (self.table[:length] if keep is None else self.table[keep[0]])
        if kind == "lookup":
            places = torch.arange(length)[None] if keep is None else keep
            return x + nn.functional.embedding(places, self.table)
        if kind == "first":
            return x + context.tensors["first"]
        if kind == "zeros":
            return x + torch.zeros(x.shape[0], length, x.shape[2]).masked_fill(x > 1, 0.1)
        if kind == "pooled":
            return x + x.mean(1, keepdim=True)
        return x


EXTRAS = ("table", "arange", "arange_rows", "lookup", "first", "zeros", "pooled")
RESIDUALS = ("plain", "gated", "scaled", "sandwich", "in_place", "onto_x", "parallel")
