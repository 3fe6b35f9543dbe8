"""Attention with independent variants of each part: projections, rotary embedding, grouped heads,
scores, mask, softmax.  :class:`LayerStyle` chooses them, and those of the rest of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.plain.spellings import JOINS, SPLITS, Attention, Context, Sizes, Style

LOW = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LayerStyle:
    """How one layer spells each of its parts."""

    split: str = "view"
    rotate: str = "halves"
    seq_first: bool = False
    repeat: str = "expand"
    attend: str = "sdpa"
    product: str = "matmul"
    masking: str = "fill"
    weigh: str = "matmul"
    crop: bool = False
    window: bool = False
    share: bool = False
    join: str = "reshape"
    mlp: str = "plain"
    residual: str = "plain"
    extra: str = "none"
    hazard: str = "none"


# --- projections ----------------------------------------------------------------------------


def _sliced(a: Attention, x: Tensor) -> list[Tensor]:
    fused = x @ torch.cat([a.q.weight, a.k.weight, a.v.weight]).t()
    n, m = a.q.out_features, a.k.out_features
    parts = fused[..., :n], fused[..., n : n + m], fused[..., n + m :]
    return [p.unflatten(-1, (-1, a.head_dim)).permute(0, 2, 1, 3) for p in parts]


def _interleaved(a: Attention, x: Tensor) -> list[Tensor]:
    """One weight with q, k and v of each head side by side, as BLOOM and GPT-NeoX keep them."""
    b, s, width = x.shape
    weights = [p.weight.view(-1, a.head_dim, width) for p in (a.q, a.k, a.v)]
    fused = F.linear(x, torch.stack(weights, 1).reshape(-1, width))
    fused = fused.view(b, s, -1, 3 * a.head_dim).transpose(1, 2)
    return list(fused.tensor_split(3, dim=-1))


def _tokens_and_heads(a: Attention, x: Tensor) -> list[Tensor]:
    """[B*S, H, Dh] in between, as kernels for packed sequences want it."""
    b, s, _ = x.shape
    flat = [p(x).view(-1, p.out_features // a.head_dim, a.head_dim) for p in (a.q, a.k, a.v)]
    return [p.view(b, s, *p.shape[1:]).transpose(1, 2) for p in flat]


def _addmm(a: Attention, x: Tensor) -> list[Tensor]:
    """GPT-2's Conv1D."""
    b, s, width = x.shape
    found = []
    for p in (a.q, a.k, a.v):
        zero = x.new_zeros(p.out_features)
        y = torch.addmm(zero, x.view(-1, width), p.weight.t()).view(b, s, p.out_features)
        found.append(y.view(b, s, -1, a.head_dim).permute(0, 2, 1, 3))
    return found


def _tokens_first(a: Attention, x: Tensor) -> list[Tensor]:
    """[S, B, D], as fairseq has it."""
    x = x.transpose(0, 1)
    return [p(x).view(*x.shape[:2], -1, a.head_dim).permute(1, 2, 0, 3) for p in (a.q, a.k, a.v)]


def _heads_in_batch(a: Attention, x: Tensor) -> list[Tensor]:
    b, s, _ = x.shape
    found = []
    for p in (a.q, a.k, a.v):
        heads = p.out_features // a.head_dim
        flat = p(x).view(b, s, heads, a.head_dim).transpose(1, 2).reshape(b * heads, s, a.head_dim)
        found.append(flat.view(b, heads, s, a.head_dim))
    return found


EQUAL_HEADS = {"chunk", "unbind", "stack", "interleaved"}
PROJECTIONS: dict[str, Callable[[Attention, Tensor], list[Tensor]]] = {
    **SPLITS,
    "sliced": _sliced,
    "interleaved": _interleaved,
    "tokens_and_heads": _tokens_and_heads,
    "addmm": _addmm,
    "tokens_first": _tokens_first,
    "heads_in_batch": _heads_in_batch,
}


# --- rotary embedding: x [B, H, S, Dh] by angles [.., S, Dh / 2] that broadcast ---------------


def _halves(x: Tensor, angle: Tensor) -> Tensor:
    angle = torch.cat([angle, angle], dim=-1)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * angle.cos() + turned * angle.sin()


def _chunked(x: Tensor, angle: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def _pairs(x: Tensor, angle: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _unflattened(x: Tensor, angle: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).reshape(x.shape)
    angle = angle.repeat_interleave(2, dim=-1)
    return x * angle.cos() + turned * angle.sin()


def _complex(x: Tensor, angle: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def _partial(x: Tensor, angle: Tensor) -> Tensor:
    """Only the first half of the channels turns."""
    n = x.shape[-1] // 2 // 2 * 2
    turning, still = x[..., :n], x[..., n:]
    return torch.cat([_halves(turning, angle[..., : n // 2]), still], dim=-1)


def _written(x: Tensor, angle: Tensor) -> Tensor:
    """Into slices of a new tensor, in place."""
    turned, half = torch.empty_like(x), x.shape[-1] // 2
    cos, sin = angle.cos(), angle.sin()
    turned[..., :half] = x[..., :half] * cos - x[..., half:] * sin
    turned[..., half:] = x[..., half:] * cos + x[..., :half] * sin
    return turned


ROTATIONS = {"halves": _halves, "chunked": _chunked, "pairs": _pairs, "unflattened": _unflattened,
             "complex": _complex, "partial": _partial, "written": _written}  # fmt: skip


# --- attention ------------------------------------------------------------------------------


def _expanded(x: Tensor, times: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, times, s, d).reshape(b, h * times, s, d)


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": _expanded,
    "interleave": lambda x, times: x.repeat_interleave(times, dim=1),
    "flatten": lambda x, t: x.unsqueeze(2).expand(-1, -1, t, -1, -1).flatten(1, 2),
    "repeat": lambda x, t: x.unsqueeze(2).repeat(1, 1, t, 1, 1).flatten(1, 2),
}


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:2], a.shape[2], b.shape[3])


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5,
    "scaled": lambda q, k: (q * q.shape[-1] ** -0.5) @ k.mT,
    "permuted": lambda q, k: q @ k.permute(0, 1, 3, 2) / q.shape[-1] ** 0.5,
    "bmm": lambda q, k: _bmm(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5,
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5,
}
WEIGHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": torch.matmul,
    "bmm": _bmm,
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
}


def _added(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, LOW)


MASKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fill": lambda scores, mask: scores.masked_fill(~mask, LOW),
    "where": lambda scores, mask: torch.where(mask, scores, LOW),
    "where_not": lambda scores, mask: torch.where(mask.logical_not(), LOW, scores),
    "fill_eq": lambda scores, mask: scores.masked_fill(mask == 0, LOW),
    "add": _added,
    "fill_": lambda scores, mask: scores.masked_fill_(~mask, LOW),
}


class RandomAttention(Attention):
    """q, k, v -> output [B, S, D], and the keys and values that a cache would hold."""

    def __init__(self, z: Sizes, layer: LayerStyle, own: Collection[str] = ()) -> None:
        """own: of "positions" and "mask", what the layer makes from its input's length."""
        super().__init__(z, Style())
        self.layer, self.own = layer, own

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = PROJECTIONS[self.layer.split](self, x)
        angle = self.angles(x, context)
        if angle is not None:
            q, k = self.rotated(q, angle), self.rotated(k, angle)
        seen = k, v
        if self.layer.share and context.get("shared_k") is not None:
            seen = context.tensors["shared_k"], context.tensors["shared_v"]
        attend = self.fused if self.layer.attend == "sdpa" else self.eager
        y = attend(q, *seen, self.mask(x, context))
        return self.o(JOINS[self.layer.join](y)), k, v

    def angles(self, x: Tensor, context: Context) -> Tensor | None:
        """[1 or B, S, Dh / 2] or [S, Dh / 2]; made here from the positions where no table comes."""
        angle, positions = context.get("angle"), context.get("positions")
        if "positions" in self.own:
            positions = torch.arange(x.shape[1]) if context.keep is None else context.keep[0]
        if angle is None and positions is not None:
            step = 10.0 ** -torch.arange(0, self.head_dim, 2)
            angle = positions.unsqueeze(-1) * step
        return angle

    def rotated(self, x: Tensor, angle: Tensor) -> Tensor:
        turn = ROTATIONS[self.layer.rotate]
        if self.layer.seq_first:
            return turn(x.transpose(1, 2), angle.unsqueeze(-2)).transpose(1, 2)
        return turn(x, angle.unsqueeze(1) if angle.ndim == 3 else angle)

    def mask(self, x: Tensor, context: Context) -> Tensor | None:
        """The mask as [S, S], [1, S, S] or [*, *, S, S]."""
        mask = context.get("window" if self.layer.window else "mask")
        length = x.shape[1]
        if "mask" in self.own:  # kept positions ascend, so it is a triangle after the cut, too
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            keys = context.get("valid")
            mask = mask if keys is None else mask & keys[:, None, None, :]
        if mask is None:
            return None
        if mask.ndim == 3:
            mask = mask.unsqueeze(1)
        return mask[..., :length] if self.layer.crop else mask

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if self.layer.repeat != "gqa" and grouped:
            k, v, grouped = self.repeated(q, k), self.repeated(q, v), False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        k, v = self.repeated(q, k), self.repeated(q, v)
        scores = PRODUCTS[self.layer.product](q, k)
        if mask.dtype == torch.bool:
            scores = MASKINGS[self.layer.masking](scores, mask)
        else:
            scores = scores + mask
        if self.layer.attend == "float32":
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        elif self.layer.attend == "shifted":
            weights = torch.softmax(scores - scores.amax(-1, keepdim=True), -1)
        else:
            weights = F.dropout(scores.softmax(-1), p=0.1, training=self.training)
        return WEIGHS[self.layer.weigh](weights, v)

    def repeated(self, q: Tensor, x: Tensor) -> Tensor:
        times = q.shape[1] // x.shape[1]
        return x if times == 1 else REPEATS[self.layer.repeat](x, times)
