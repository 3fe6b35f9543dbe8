"""Several kinds of tokens, merged in several graphs of one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.hooks import Hooks, installed
from dartfx.tools.zoo.registry import load
from tests.support.families import tower_outside
from tests.support.plain.decoders import IMAGE, Decoder, Sizes, assert_same, prompt, pruned_by_hand
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS: dict[str, Any] = {"lowering": "eager", "on_unsupported": "error", "kv_layout": "layered"}
SIZES = Sizes(layers=3)


class Kinds(Decoder):
    """Merges its features kind by kind, each in a graph of its own."""

    kinds = 3

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x = self.kind(self.embed(ids), ids, features, 0)
        torch._dynamo.graph_break()
        x = self.kind(x, ids, features, 1)
        torch._dynamo.graph_break()
        if self.kinds == 3:
            x = self.kind(x, ids, features, 2)
            torch._dynamo.graph_break()
        return self.decode(x, valid)

    def kind(self, x: Tensor, ids: Tensor, features: Tensor, kind: int) -> Tensor:
        vision, rows = ids == IMAGE, features.shape[0] // self.kinds
        count = vision.cumsum(1)
        mask = vision & (count > kind * rows) & (count <= (kind + 1) * rows)
        return x.masked_scatter(mask.unsqueeze(-1), features[kind * rows : (kind + 1) * rows])

    def decode(self, x: Tensor, valid: Tensor | None) -> Any:
        context, outputs = self.context(x, valid), []
        for layer in self.layers:
            x, k, v = layer(x, context)
            outputs += [k, v]
        return self.finish(x, outputs, [])


class Two(Kinds):
    kinds = 2


class Packing(Kinds):
    """Its tower packs frames by a masked write of its own, before the merge."""

    kinds = 1

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        frames = torch.zeros(1, features.shape[0] + 4, features.shape[1])
        filled = torch.arange(frames.shape[1])[None] < features.shape[0]
        frames = frames.masked_scatter(filled.unsqueeze(-1), features)
        torch._dynamo.graph_break()
        x = self.kind(self.embed(ids), ids, frames[0, : features.shape[0]] * 1.0, 0)
        torch._dynamo.graph_break()
        return self.decode(x, valid)


def called(model: Decoder, inputs: dict[str, Tensor]) -> Any:
    compiled = dartfx.compile(model, retain_tokens=RETAIN, **OPTIONS)
    with torch.no_grad():
        return compiled(**inputs)


@pytest.mark.parametrize("kind", [Two, Kinds, Packing])
def test_all_kinds_are_one_mask(kind: type[Decoder]) -> None:
    model, inputs = kind(SIZES).eval(), prompt(SIZES)
    with torch.no_grad():
        right = pruned_by_hand(model, inputs, RETAIN)
    assert_same(called(model, inputs), right)
    assert any(report.pruned for report in dartfx.reports())
    assert not any("ran unpruned" in str(report) for report in dartfx.reports())


def test_a_call_without_the_first_kind_is_pruned_by_the_others() -> None:
    """Records go with embeddings: what one call merged is no part of the next call's mask."""
    model, inputs = Kinds(SIZES).eval(), prompt(SIZES)
    called(model, inputs)
    other = prompt(SIZES)
    with torch.no_grad():
        right = pruned_by_hand(model, other, RETAIN)
        assert_same(model(**other), right)


def test_an_image_and_a_video_in_a_plain_forward() -> None:
    built = load("qwen2_5_vl", layers=3)
    structure, picture, count = built.structure, built.image_token_id, built.tokens_per_image
    video = picture - 1  # the family's video token
    around = [list(structure.image_prefix), list(structure.image_suffix)]
    parts = [around[0] + [token] * count + around[1] for token in (picture, video)]
    ids = torch.tensor([[3, 4, 5, *parts[0], 9, 8, *parts[1], 20, 21]])
    pixels = structure.pixels(2, torch.Generator().manual_seed(5))
    rows = len(pixels["pixel_values"]) // 2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == picture).int() + 2 * (ids == video).int(),
        "pixel_values": pixels["pixel_values"][:rows],
        "pixel_values_videos": pixels["pixel_values"][rows:],
        "image_grid_thw": pixels["image_grid_thw"][:1],
        "video_grid_thw": pixels["image_grid_thw"][1:],
    }
    hooks = Hooks(built.model, inputs, 2, RETAIN, hooked.float64_selector)
    hooks.vision = (ids == picture) | (ids == video)
    with installed(hooks, "layered"):
        right = built.model(**inputs, use_cache=True).logits
    model = dartfx.compile(tower_outside(built.model), retain_tokens=RETAIN, **OPTIONS)
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(ours, right, **CLOSE)
