"""Baselines for timing the selection: the published algorithm, and a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Layer", "published"]


def published(hidden: Tensor, keys: Tensor, first: int, count: int, retain: int) -> Tensor:
    """DART as the authors' code computes it (arXiv 2502.11494), for one row.

    hidden: [1, S, D].  keys: [1, H, S, Dh].  The vision tokens are first .. first + count; at
    least 4 positions follow them.  Returns [S'] int64, ascending, with 4 + 8 * (retain // 8)
    vision tokens.  Every ``tolist`` waits for the device, and pivots come in the order of a set.
    """
    length, after = keys.shape[2], first + count
    norms = keys[0].transpose(0, 1).reshape(length, -1).norm(p=1, dim=-1)
    image = (norms[first:after].topk(4).indices + first).tolist()
    text = (norms[after:].topk(4).indices + after).tolist()
    kept = set(image)
    left = set(range(first, after)) - kept
    for pivot in set(image + text):
        candidates = list(left)
        similarity = F.cosine_similarity(hidden[0, pivot], hidden[0, candidates], dim=-1)
        lowest = (-similarity).topk(retain // 8).indices.tolist()
        picks = {candidates[i] for i in lowest}
        kept |= picks
        left -= picks
    stays = [*range(first), *sorted(kept), *range(after, length)]
    return torch.tensor(stays, device=hidden.device)


class Layer(nn.Module):
    """A decoder layer: grouped causal attention and a gated MLP, each behind an RMS norm.

    Rotary embedding is left out: its cost is below the noise of the matrix products.
    """

    def __init__(self, width: int, heads: int, key_heads: int, head: int, inner: int) -> None:
        super().__init__()
        self.head = head
        self.key_heads = key_heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, (heads + 2 * key_heads) * head, bias=False)
        self.out = nn.Linear(heads * head, width, bias=False)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [B, S, D]; returns the same shape."""
        batch, length, _ = hidden.shape
        mixed = self.qkv(self.norms[0](hidden)).view(batch, length, -1, self.head).transpose(1, 2)
        heads = mixed.shape[1] - 2 * self.key_heads
        q, k, v = mixed.split([heads, self.key_heads, self.key_heads], 1)
        grouped = self.key_heads != heads
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.up(self.norms[1](hidden)).chunk(2, -1)
        down: Tensor = self.down(F.silu(gate) * up)
        return hidden + down
