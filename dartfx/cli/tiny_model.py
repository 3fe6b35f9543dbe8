"""A vision-language model in thirty lines: what the doctor compiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Tiny", "prompt"]

IMAGE, WIDTH, HEADS, VOCABULARY = 1, 32, 2, 64
VISION, TEXT = 16, 8


class Layer(nn.Module):
    """Causal self-attention with a residual; no MLP, whose kernels would cost more seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return result


class Tiny(nn.Module):
    """ids [B, S], features [B * VISION, WIDTH] -> logits of the last position [B, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        x = self.embed(ids).masked_scatter((ids == IMAGE)[..., None], features)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))[:, -1]
        return logits


def prompt(device: str) -> tuple[Tensor, Tensor]:
    """Random ids with one image in the middle, and its features."""
    ids = torch.randint(2, VOCABULARY, (1, TEXT + VISION), device=device)
    ids[:, TEXT // 2 : TEXT // 2 + VISION] = IMAGE
    return ids, torch.randn(VISION, WIDTH, device=device)
