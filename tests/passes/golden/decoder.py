"""The smallest decoder that every step of a cut changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Layer(nn.Module):
    """Attention of two heads with one rotary table, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, _ = x.shape
        key = self.qk(x).view(rows, length, 2, 4).transpose(1, 2) * table.unsqueeze(1)
        value = self.v(x).view(rows, length, 2, 4).transpose(1, 2)
        y = sdpa(key, key, value, is_causal=True).transpose(1, 2).reshape(rows, length, 8)
        return x + y, key, value


class Layers(nn.ModuleList):
    """x [B, S, 8] -> the last hidden state and the keys of every layer."""

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        keys = []
        for layer in self:
            x, key, _ = layer(x, table)
            keys.append(key)
        return x, *keys


class Decoder(nn.Module):
    """ids [1, S], features [N, 8] -> the last hidden state and the keys of both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.layers = Layers([Layer(), Layer()])

    def forward(self, ids: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids).masked_scatter((ids == 1)[..., None], features)
        table = torch.arange(ids.shape[1])[None, :, None].expand(1, -1, 4).cos()
        x, *keys = self.layers(x, table)
        return self.norm(x), *keys
