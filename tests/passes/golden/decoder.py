"""The smallest decoder that is changed by every step of a cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Layer(nn.Module):
    """Attention of two heads with one rotary table, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(
        self, x: Tensor, table: Tensor, past: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = x.shape
        key = self.qk(x).view(rows, length, 2, 4).transpose(1, 2) * table.unsqueeze(1)
        value = self.v(x).view(rows, length, 2, 4).transpose(1, 2)
        if past is None:
            y = sdpa(key, key, value, is_causal=True)
        else:
            query, key = key, torch.cat([past, key], 2)
            y = sdpa(query, key, torch.cat([past, value], 2), mask)
        return x + y.transpose(1, 2).reshape(rows, length, 8), key, value


class Layers(nn.ModuleList):
    """x [B, S, 8] -> the last hidden state and the keys of every layer."""

    def forward(self, x: Tensor, table: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
        keys = []
        for layer in self:
            x, key, _ = layer(x, table, *cached)
            keys.append(key)
        return x, *keys


class Decoder(nn.Module):
    """ids [1, S], features [N, 8] -> the last hidden state and the keys of both layers.

    past: keys (and values) [1, 2, P, 4] of earlier tokens, the same in both layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.layers = Layers([Layer(), Layer()])

    def forward(
        self, ids: Tensor, features: Tensor, past: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        x = self.embed(ids).masked_scatter((ids == 1)[..., None], features)
        table = torch.arange(ids.shape[1])[None, :, None].expand(1, -1, 4).cos()
        cached: tuple[Tensor, ...] = ()
        if past is not None:
            mask = torch.ones(ids.shape[1], past.shape[2] + ids.shape[1], dtype=torch.bool)
            cached = past, mask.tril(past.shape[2])
        x, *keys = self.layers(x, table, *cached)
        return self.norm(x), *keys
