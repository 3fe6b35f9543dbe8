"""Only vision features merged into the embeddings count as vision tokens, and none is missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as attend

import dartfx
from dartfx.passes.analysis.prefilter import has_causal_attention
from dartfx.passes.outcome import Pruned, Unchanged
from tests.support.plain.decoders import IMAGE, Decoder, assert_same, prompt, pruned_by_hand, run
from tests.support.plain.refusals import RETAIN, SMALL, assert_declined, assert_pruned

LEARNED = 39


class Inverted(Decoder):
    """The vision mask is made a mask of text, in place, once the features are merged."""

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids == IMAGE
        x = self.embed(ids).masked_scatter(vision.unsqueeze(-1), features)
        text = vision.logical_not_()
        return x + text.unsqueeze(-1) * 0.01, vision


def test_mask_that_is_written_to_after_the_merge() -> None:
    assert_declined(Inverted(SMALL), prompt(SMALL), "written to after the merge")


class LearnedPrompt(Decoder):
    """Rows of a parameter stand at positions of their own, put there before or after the merge."""

    def __init__(self, first: bool) -> None:
        super().__init__(SMALL)
        self.first, self.learned = first, nn.Parameter(torch.randn(3, SMALL.hidden))

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x, vision = self.embed(ids), ids == IMAGE
        if self.first:
            x = x.index_put((ids == LEARNED,), self.learned)
        x = x.masked_scatter(vision.unsqueeze(-1), features)
        if not self.first:
            x = x.masked_scatter((ids == LEARNED).unsqueeze(-1), self.learned * 2)
        return x, vision


@pytest.mark.parametrize("first", [True, False])
def test_learned_prompt_is_not_vision(first: bool) -> None:
    inputs = prompt(SMALL)
    inputs["ids"][inputs["ids"] == LEARNED] = 5
    inputs["ids"][0, -5:-2] = LEARNED
    assert_pruned(LearnedPrompt(first), inputs)


class Joined(Decoder):
    """Vision features stand between two pieces of text, with no mask that tells where."""

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        return torch.cat([x[:, :2], features[None], x[:, 14:]], 1), ids == IMAGE


def test_features_that_are_joined_do_not_pass_in_silence() -> None:
    model, inputs = Joined(SMALL).eval(), prompt(SMALL)
    outputs, outcome = run(model, inputs, retain_tokens=RETAIN, layer=1)
    assert isinstance(outcome, Unchanged)
    assert outcome.unsure
    assert "float32 ['12', '16']" in outcome.because
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)


def _assign(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[mask] = rows
    return x


ONE_ROW = {
    "assigned": _assign,
    "index_put": lambda x, mask, rows: x.index_put((mask,), rows),
    "masked_scatter": lambda x, mask, rows: x.masked_scatter(mask[..., None], rows),
    "rows": lambda x, mask, rows: _assign(x.flatten(0, 1), mask.flatten(), rows).view_as(x),
}


@pytest.mark.parametrize("put", ONE_ROW.values(), ids=ONE_ROW)
def test_an_image_of_one_token_has_nothing_to_drop(put: Callable[..., Tensor]) -> None:
    class OneToken(Decoder):
        def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            vision = ids == IMAGE
            return put(self.embed(ids), vision, features * 2), vision

    model, inputs = OneToken(SMALL).eval(), prompt(SMALL)
    one = {"ids": inputs["ids"].clone(), "features": inputs["features"][:1]}
    one["ids"][0, 3:14] = 5
    outputs, outcome = run(model, one, retain_tokens=RETAIN, layer=1)
    assert isinstance(outcome, Unchanged)
    assert outcome.all_retained, outcome
    with torch.no_grad():
        assert_same(outputs, model(**one), rtol=0, atol=0)
    assert_pruned(model, inputs)  # the next image


def test_one_row_computed_from_the_embeddings_is_no_feature() -> None:
    """As pads that are set to the mean: the merge behind it is the only one."""

    class MeanPads(Decoder):
        def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            x[ids == LEARNED] = x.mean(1)
            vision = ids == IMAGE
            return x.masked_scatter(vision.unsqueeze(-1), features), vision

    inputs = prompt(SMALL)
    inputs["ids"][0, -3] = LEARNED
    assert_pruned(MeanPads(SMALL), inputs)


def test_one_row_for_several_positions_is_no_feature() -> None:
    """As markers around an image, which come with its features (Ovis 2)."""

    class Markers(Decoder):
        def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            vision = ids == IMAGE
            x = self.embed(ids).masked_scatter(vision.unsqueeze(-1), features)
            x[ids == LEARNED] = features[0] * 2
            return x, vision

    inputs = prompt(SMALL)
    inputs["ids"][0, -3:-1] = LEARNED
    assert_pruned(Markers(SMALL), inputs)


def test_two_media_of_which_one_is_merged_by_an_earlier_graph() -> None:
    """Sound before images (Qwen2.5-Omni in generate): both are vision tokens."""

    class Sound(Decoder):
        def forward(self, ids: Tensor, features: Tensor) -> Any:
            sound = (ids == LEARNED).unsqueeze(-1)
            self.heard = self.embed(ids).masked_scatter(sound, features[:4])
            torch._dynamo.graph_break()
            return super().forward(ids, features)

        def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            image = ids == IMAGE
            x = self.heard.masked_scatter(image.unsqueeze(-1), features[4:])
            return x, (ids == LEARNED) | image

    model, inputs = Sound(SMALL).eval(), prompt(SMALL)
    inputs["ids"][inputs["ids"] == LEARNED] = 5
    inputs["ids"][0, 2:6] = LEARNED
    options = {"retain_tokens": RETAIN, "layer": 1, "lowering": "eager"}
    with torch.no_grad():
        outputs = torch.compile(model, backend="dart", options=options)(**inputs)
    outcome = dartfx.reports()[-1].outcome
    assert isinstance(outcome, Pruned), outcome
    assert outcome.vision_tokens == 12
    assert outcome.how == "merge in an earlier graph; merge in the graph"
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1))


# --- attention that hides later keys is a decoder's, which may have missed its vision mask -----

S = 6
Make = Callable[[Tensor], Tensor]


def of_pads(pads: Tensor) -> Tensor:
    """As transformers makes the mask of a vision tower with padded patches."""
    queries, keys = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None]
    rows = torch.arange(len(pads))[:, None, None, None]
    return (queries >= 0) & pads[rows, keys]


def of_lowest(pads: Tensor) -> Tensor:
    return (1.0 - pads[:, None, None].float()) * torch.finfo(torch.float32).min


def of_positions(pads: Tensor) -> Tensor:
    queries, keys = torch.arange(S)[:, None], torch.arange(S)
    return (keys <= queries) & pads[:, None, None]


def of_a_triangle(pads: Tensor) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril() & pads[:, None, None]


def of_a_prefix(pads: Tensor) -> Tensor:
    return of_positions(pads) | (torch.arange(S) < 3)


def fused(x: Tensor, mask: Tensor) -> Tensor:
    return attend(x, x, x, attn_mask=mask)


def eager(x: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(x, x.transpose(2, 3)) * 0.5
    added = mask if mask.is_floating_point() else torch.where(mask, 0.0, -1e9)
    return torch.matmul(torch.softmax(scores + added, -1), x)


@pytest.mark.parametrize("attention", [fused, eager])
@pytest.mark.parametrize(
    ("make", "causal"),
    [
        (of_pads, False),
        (of_lowest, False),
        (of_positions, True),
        (of_a_triangle, True),
        (of_a_prefix, True),
        (None, True),  # made by the caller
    ],
)
def test_attention_that_hides_later_keys(
    make: Make | None, causal: bool, attention: Callable[..., Tensor]
) -> None:
    graphs: list[GraphModule] = []

    def look(module: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    def layer(x: Tensor, mask: Tensor) -> Tensor:
        return attention(x, mask if make is None else make(mask))

    torch.compiler.reset()
    mask = torch.ones(2, S, dtype=torch.bool) if make else torch.ones(2, 1, S, S).bool()
    torch.compile(layer, backend=look)(torch.randn(2, 1, S, 4), mask)
    assert [has_causal_attention(module.graph) for module in graphs] == [causal]
