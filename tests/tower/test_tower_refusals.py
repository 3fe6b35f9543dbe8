"""Towers whose attention is not that of one vision token each, and calls without a tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dartfx
from dartfx.errors import ConfigError, SelectionError, UnsupportedGraphError
from dartfx.passes.refusal import Declined
from dartfx.selection import registry
from dartfx.tools.zoo.registry import load
from tests.support.plain.towers import PATCHES, WIDTH, Seeing, run, softmax, watched
from tests.support.slow import slow
from tests.support.tolerances import RETAIN


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    dartfx.reset()
    yield
    dartfx.reset()


def no_first(x: Tensor) -> Tensor:
    return x[:, 1:]


def pooled(x: Tensor) -> Tensor:
    return x[:, 1:].unflatten(1, (-1, 2)).mean(2)


def across(x: Tensor) -> Tensor:
    return x[:, 1:].unflatten(1, (2, 2)).transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def turned(x: Tensor) -> Tensor:
    return x[:, 1:].flip(1)


def images_turned(x: Tensor) -> Tensor:
    return torch.cat([image[1:] for image in reversed(x.unbind(0))])


def two_less(x: Tensor) -> Tensor:
    return x[:, 2:]


def ends_less(x: Tensor) -> Tensor:
    return x[:, 1:-1]


def token_by_token(x: Tensor) -> Tensor:
    return x[:, 1:].transpose(0, 1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def none_at_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


LATENTS = torch.randn(1, 1, 1 + PATCHES, WIDTH)


def latents(x: Tensor) -> Tensor:
    """As many as the tower's tokens, which they attend to."""
    heads = x[:, None]
    queries = LATENTS.expand(x.shape[0], -1, -1, -1)
    return scaled_dot_product_attention(queries, heads, heads)[:, 0, 1:]


NOT_ONE_TO_ONE = "does not keep one vision token for each"


@pytest.mark.parametrize(
    ("between", "attend", "message"),
    [
        (pooled, softmax, f"aten.unflatten.int, .*{NOT_ONE_TO_ONE}"),
        (images_turned, softmax, NOT_ONE_TO_ONE),
        (latents, softmax, "not among the tokens of an image"),
        *slow(
            (across, softmax, NOT_ONE_TO_ONE),
            (turned, softmax, f"aten.flip.default, .*{NOT_ONE_TO_ONE}"),
            (token_by_token, softmax, NOT_ONE_TO_ONE),
            (ends_less, softmax, NOT_ONE_TO_ONE),
            (two_less, softmax, "leave out 2 first tokens"),
            (no_first, causal, "is masked"),
            (no_first, none_at_all, "no attention in this graph computes"),
        ),
    ],
)
def test_features_that_are_not_one_to_one_are_refused(
    between: Callable[[Tensor], Tensor], attend: Callable[..., Tensor], message: str
) -> None:
    watched()
    run(Seeing(between, attend), on_unsupported="ignore")
    (declined,) = [r.outcome for r in dartfx.reports()]
    assert isinstance(declined, Declined)
    assert re.search(
        rf"{message}.*; at .*tower\w*\.py.*; try: a selector that needs no", str(declined)
    )


def test_features_from_elsewhere_are_refused() -> None:
    watched()
    family = load("llava", layers=3)
    inputs = dict(family.make_inputs("one"))
    with torch.no_grad():
        output = family.model.model.get_image_features(inputs["pixel_values"]).pooler_output
        vision = inputs["input_ids"] == family.image_token_id
        embeds = family.model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = embeds.masked_scatter(vision[..., None], torch.cat(list(output)))
        del inputs["pixel_values"]
        options: dict[str, Any] = {"retain_tokens": RETAIN, "selector": "watched"}
        dartfx.compile(family.model, **options, lowering="eager", on_unsupported="error")
        with (
            dartfx.vision_tokens(vision),
            pytest.raises(UnsupportedGraphError, match="merges features computed before it"),
        ):
            family.model(**inputs)


def test_what_cannot_work_is_said_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"'attended'.*layer=\[0, 2\] names 2"):
        dartfx.DartConfig(layer=(0, 2), retain_tokens=(9, 6), selector="attended")
    hidden, keys = torch.randn(1, 6, 4), torch.randn(1, 1, 6, 2)
    vision = torch.arange(6)[None] < 4
    with pytest.raises(SelectionError, match="tower_attention must be given"):
        dartfx.select_tokens(hidden, keys, vision, 2, selector="attended")
    with pytest.raises(SelectionError, match=r"tower_attention must be \[B, S\] = \(1, 6\)"):
        dartfx.select_tokens(
            hidden, keys, vision, 2, selector="attended", tower_attention=torch.randn(1, 5)
        )
