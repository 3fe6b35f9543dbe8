"""Many variants of one decoder block in plain torch, and the sizes and styles that choose them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Every size of a decoder and its prompt; tests make them coincide on purpose."""

    batch: int = 1
    seq: int = 24
    vision: int = 12
    hidden: int = 16
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    inner: int = 20
    vocab: int = 40
    layers: int = 3


@dataclass(frozen=True)
class Style:
    """How a decoder spells what all of them compute."""

    split: str = "view"
    join: str = "reshape"
    attend: str = "sdpa"
    rope: str = "none"
    mask: str = "none"
    mlp: str = "plain"
    norm: str = "layer"
    extra: str = "none"


@dataclass
class Context:
    """What every layer gets besides the hidden states.

    tensors: by name; dims: the token dims of each; keep: positions of the tokens at hand [B, S'],
    None before the cut.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    dims: dict[str, tuple[int, ...]] = field(default_factory=dict)
    keep: Tensor | None = None

    def add(self, name: str, value: Tensor, *dims: int) -> None:
        self.tensors[name], self.dims[name] = value, dims

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def row(self, index: int, keep: Tensor) -> Context:
        """The same values for the kept tokens [1, S'] of one row of the batch."""
        tensors = {n: self._row(n, index, keep[0]) for n in self.tensors}
        return Context(tensors, self.dims, keep)

    def _row(self, name: str, index: int, keep: Tensor) -> Tensor:
        value, dims = self.tensors[name], self.dims[name]
        if 0 not in dims and value.shape[0] > 1:
            value = value[index : index + 1]
        for dim in dims:
            value = value.index_select(dim, keep)
        return value


# --- spellings of one block -----------------------------------------------------------------


def _view(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, _ = x.shape
    return [p(x).view(b, s, -1, a.head_dim).transpose(1, 2) for p in (a.q, a.k, a.v)]


def _reshape(a: Attention, x: Tensor) -> list[Tensor]:
    shape = (*x.shape[:-1], -1, a.head_dim)
    return [p(x).reshape(shape).permute(0, 2, 1, 3) for p in (a.q, a.k, a.v)]


def _unflatten(a: Attention, x: Tensor) -> list[Tensor]:
    return [p(x).unflatten(-1, (-1, a.head_dim)).swapaxes(-3, -2) for p in (a.q, a.k, a.v)]


def _einsum(a: Attention, x: Tensor) -> list[Tensor]:
    weights = (p.weight.view(-1, a.head_dim, x.shape[-1]) for p in (a.q, a.k, a.v))
    return [torch.einsum("bsc,hdc->bhsd", x, w) for w in weights]


def _fused(a: Attention, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([a.q.weight, a.k.weight, a.v.weight]))


def _split(a: Attention, x: Tensor) -> list[Tensor]:
    widths = [p.weight.shape[0] for p in (a.q, a.k, a.v)]
    parts = _fused(a, x).split(widths, dim=-1)
    return [p.view(*x.shape[:2], -1, a.head_dim).transpose(1, 2) for p in parts]


def _chunk(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, _ = x.shape
    return [p.view(b, s, -1, a.head_dim).transpose(1, 2) for p in _fused(a, x).chunk(3, dim=-1)]


def _unbind(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, _ = x.shape
    fused = _fused(a, x).view(b, s, 3, -1, a.head_dim).permute(2, 0, 3, 1, 4)
    return list(fused.unbind(0))


def _stack(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, _ = x.shape
    fused = torch.stack([p(x) for p in (a.q, a.k, a.v)], dim=2)
    fused = fused.view(b, s, 3, -1, a.head_dim).transpose(1, 3)
    return [fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]]


def _flat_rows(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, width = x.shape
    flat = x.reshape(b * s, width)
    return [p(flat).view(b, s, -1, a.head_dim).transpose(1, 2) for p in (a.q, a.k, a.v)]


SPLITS: dict[str, Callable[[Attention, Tensor], list[Tensor]]] = {
    "view": _view,
    "reshape": _reshape,
    "unflatten": _unflatten,
    "einsum": _einsum,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "stack": _stack,
    "flat_rows": _flat_rows,
}

JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda y: y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1),
    "view": lambda y: y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], -1),
    "flatten": lambda y: y.permute(0, 2, 1, 3).flatten(2),
    "cat": lambda y: torch.cat(list(y.unbind(1)), dim=-1),
    "rows": lambda y: y.transpose(1, 2).reshape(y.shape[0] * y.shape[2], -1).view(
        y.shape[0], y.shape[2], -1
    ),
}  # fmt: skip


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _repeated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (_repeat(t, q.shape[1] // t.shape[1]) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _repeat(x: Tensor, times: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, times, s, d).reshape(b, h * times, s, d)


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (_repeat(t, q.shape[1] // t.shape[1]) for t in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    assert mask.dtype == torch.bool
    scores = torch.matmul(q, k.mT) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    return torch.matmul(scores.softmax(-1), v)


def _where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    scores = torch.matmul(q, k.mT) / q.shape[-1] ** 0.5
    return torch.where(mask, scores, torch.finfo(q.dtype).min).softmax(-1) @ v


def _filled_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    scores = torch.matmul(q, k.mT) / q.shape[-1] ** 0.5
    return torch.where(~mask, torch.finfo(q.dtype).min, scores).softmax(-1) @ v


ATTENDS = {
    "sdpa": _causal,
    "repeated": _repeated,
    "softmax": _softmax,
    "filled": _filled,
    "where": _where,
    "filled_where": _filled_where,
}


def _rows_first(m: Mlp, x: Tensor) -> Tensor:
    b, s, width = x.shape
    flat = x.view(-1, width)
    gate = flat @ m.gate.weight.t()
    return (F.silu(gate) @ m.down.weight.T).view(b, s, width)


def _mixture(m: Mlp, x: Tensor) -> Tensor:
    """Every expert (two slices of the inner width) for every row, weighed by a router."""
    b, s, width = x.shape
    flat = x.reshape(b * s, width)
    weigh = flat[:, :2].softmax(-1)
    inner = F.silu(m.gate(flat)).view(b * s, 2, -1) * weigh[..., None]
    return m.down(inner.flatten(1)).reshape(b, s, width)


def _in_place(m: Mlp, x: Tensor) -> Tensor:
    y = m.gate(x)
    y[..., : y.shape[-1] // 2].mul_(2.0)
    y.sigmoid_()
    return m.down(y)


MLPS: dict[str, Callable[[Mlp, Tensor], Tensor]] = {
    "plain": lambda m, x: m.down(F.gelu(m.gate(x))),
    "rows": _rows_first,
    "mixture": _mixture,
    "in_place": _in_place,
    "baddbmm": lambda m, x: torch.baddbmm(
        m.gate.weight.new_zeros(()), m.gate(x).relu(), m.down.weight.t().expand(x.shape[0], -1, -1)
    ),
}


# --- the decoder ----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def make_norm(z: Sizes, style: Style) -> nn.Module:
    return RMSNorm(z.hidden) if style.norm == "rms" else nn.LayerNorm(z.hidden)


class Attention(nn.Module):
    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__()
        self.head_dim, self.style = z.head_dim, style
        self.q = nn.Linear(z.hidden, z.heads * z.head_dim, bias=False)
        self.k = nn.Linear(z.hidden, z.kv_heads * z.head_dim, bias=False)
        self.v = nn.Linear(z.hidden, z.kv_heads * z.head_dim, bias=False)
        self.o = nn.Linear(z.heads * z.head_dim, z.hidden, bias=False)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = SPLITS[self.style.split](self, x)
        cos, sin = context.get("cos"), context.get("sin")
        if cos is not None and sin is not None:
            if self.style.rope in ("batched", "one_row"):
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = ATTENDS[self.style.attend](q, k, v, context.get("mask"))
        return self.o(JOINS[self.style.join](y)), k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Mlp(nn.Module):
    def __init__(self, z: Sizes, style: Style) -> None:
        super().__init__()
        self.style = style
        self.gate = nn.Linear(z.hidden, z.inner, bias=False)
        self.down = nn.Linear(z.inner, z.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return MLPS[self.style.mlp](self, x)
