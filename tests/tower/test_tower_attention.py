"""The vision tower's attention as passed to selectors, against eager towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dartfx
from dartfx.selection import registry
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import IMAGE
from tests.support.plain.towers import WIDTH, Seeing, run, softmax, watched
from tests.support.slow import slow
from tests.support.tolerances import COMPILED_ATTENTION, RETAIN


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    dartfx.reset()
    yield
    dartfx.reset()


def placed(weights: Tensor, vision: Tensor, drops_first: bool) -> np.ndarray[Any, Any]:
    """Where attention [I, H, P, P] of images in a row goes, by position of the prompt, float64."""
    shares = []
    for image in weights.double().numpy():
        heads = image[:, 0, 1:] if drops_first else image.mean(1)
        shares += list(heads.mean(0))
    expected, rows = np.zeros(vision.shape), iter(shares)
    for row, column in zip(*np.nonzero(vision.numpy()), strict=True):
        expected[row, column] = next(rows)
    assert next(rows, None) is None
    return expected


def best(scores: np.ndarray[Any, Any], vision: Tensor, counts: list[int]) -> list[list[int]]:
    rows = []
    for row, mask, count in zip(scores, vision.numpy(), counts, strict=True):
        order = sorted(np.flatnonzero(mask), key=lambda p: (-row[p], p))
        rows.append(sorted(int(p) for p in order[:count]))
    return rows


CLASS_TOKEN = ("llava", "pad2", "sdpa", -2, True)
NO_CLASS_TOKEN = ("paligemma", "one", "eager", -1, False)
FURTHER = [("vipllava", "one", "eager", 1, True), ("llava", "ragged", "eager", -2, True)]


@pytest.mark.parametrize(
    ("name", "variant", "attention", "layer", "drops_first"),
    [CLASS_TOKEN, *slow(NO_CLASS_TOKEN, *FURTHER)],
)
def test_the_attention_is_what_the_eager_tower_says(
    name: str, variant: str, attention: str, layer: int, drops_first: bool
) -> None:
    given = watched()
    family = load(name, layers=3, attn_implementation=attention)
    plain = load(name, layers=3, attn_implementation="eager")
    inputs = family.make_inputs(variant)
    vision = inputs["input_ids"] == family.image_token_id
    with torch.no_grad():
        tower = plain.model.model.vision_tower
        eager = tower(inputs["pixel_values"], output_attentions=True)
        family.model(**inputs)  # sets up hooks that would break the graph
        options: dict[str, Any] = {"retain_tokens": RETAIN, "selector": "watched", "tokens": True}
        dartfx.compile(family.model, **options, lowering="eager", on_unsupported="error")
        family.model(**inputs, use_cache=False)
    expected = placed(eager.attentions[layer], vision, drops_first)
    np.testing.assert_allclose(given["attention"].numpy(), expected, **COMPILED_ATTENTION)
    kept: list[list[int]] = [[] for _ in vision]
    for image in dartfx.kept_tokens():
        kept[image.row] += [image.positions[i] for i in image.kept]
    assert kept == best(expected, vision, [len(row) for row in kept])


def test_generate_leaves_the_tower_in_the_graph() -> None:
    given = watched()
    family = load("llava", layers=3)
    inputs = family.make_inputs("one")
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    plain = load("llava", layers=3, attn_implementation="eager").model.model.vision_tower
    with torch.no_grad():
        eager = plain(inputs["pixel_values"], output_attentions=True)
    vision = inputs["input_ids"] == family.image_token_id
    options: dict[str, Any] = {"retain_tokens": RETAIN, "layer": 0, "lowering": "eager"}
    dartfx.compile(family.model, **options, selector="watched", on_unsupported="error")
    family.model.generate(**inputs, **settings)
    np.testing.assert_allclose(
        given["attention"].numpy(), placed(eager.attentions[-2], vision, True), **COMPILED_ATTENTION
    )


def rows_of(x: Tensor) -> Tensor:
    return x[:, 1:].reshape(-1, WIDTH)


def joined(x: Tensor) -> Tensor:
    return torch.cat(list(x[:, 1:].unbind(0)))


def whole(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("between", "attend"),
    [(whole, softmax), *slow((rows_of, softmax), (joined, scaled_dot_product_attention))],
)
def test_rows_of_features_are_the_towers_tokens(
    between: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]
) -> None:
    given, weights = watched(), []

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1 / 3 if attend is softmax else q.shape[-1] ** -0.5
        weights.append((q.double() @ k.double().transpose(-1, -2) * scale).softmax(-1))
        return attend(q, k, v)

    model = Seeing(between, attend)
    ids, patches = run(model)
    model.tower.attend = recorded
    with torch.no_grad():
        model(ids, patches)
    expected = placed(weights[-1], ids == IMAGE, between is not whole)
    np.testing.assert_allclose(given["attention"].numpy(), expected, **COMPILED_ATTENTION)
