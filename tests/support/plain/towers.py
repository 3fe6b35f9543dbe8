"""A selector that records its inputs from a tower, and a tower in front of a small decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dartfx.selection.attended import attended
from dartfx.selection.registry import register_selector
from tests.support.plain.decoders import IMAGE, Decoder, Sizes

PATCHES, WIDTH, HEADS = 4, 16, 2


def watched() -> dict[str, Tensor]:
    """Registers "watched": "attended", keeping what it was given."""
    given: dict[str, Tensor] = {}

    def watching(
        hidden: Tensor,
        keys: Tensor,
        vision_mask: Tensor,
        text_mask: Tensor,
        budget: Tensor,
        *,
        tower_attention: Tensor,
        **pivots: Any,
    ) -> Tensor:
        given["attention"] = tower_attention
        return attended(
            hidden, keys, vision_mask, text_mask, budget, tower_attention=tower_attention, **pivots
        )

    register_selector("watched", needs_keys=False)(watching)
    return given


class Tower(nn.Module):
    """One layer of attention over [class token, patches], each image alone."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = attend

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(patches.shape[0], -1, -1), patches], 1)
        heads = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.attend(q, k, v).transpose(1, 2).reshape(x.shape)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v


class Seeing(nn.Module):
    """ids [B, S], patches [I, P, W] -> logits; ``between`` makes features of the tower's output."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor],
        attend: Callable[..., Tensor] = scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.decoder = Tower(attend), Decoder(Sizes(batch=2))
        self.project = nn.Linear(WIDTH, self.decoder.z.hidden)
        self.between = between

    def forward(self, ids: Tensor, patches: Tensor) -> Any:
        return self.decoder(ids, self.project(self.between(self.tower(patches))))


def run(model: Seeing, on_unsupported: str = "error") -> tuple[Tensor, Tensor]:
    """Two rows, each with half of the images, through a bare torch.compile."""
    images = 4
    made = model.between(torch.zeros(images, 1 + PATCHES, WIDTH))
    each = made.numel() // WIDTH // 2
    ids = torch.full((2, each + 4), 5)
    ids[:, 2 : 2 + each] = IMAGE
    ids[1] = ids[1].roll(1)
    options = {"retain_tokens": 3, "selector": "watched", "lowering": "eager"}
    settings: dict[str, Any] = {"backend": "dart", "fullgraph": True, "dynamic": False}
    fast = torch.compile(model, **settings, options={**options, "on_unsupported": on_unsupported})
    patches = torch.randn(images, PATCHES, WIDTH)
    with torch.no_grad():
        fast(ids, patches)
    return ids, patches
