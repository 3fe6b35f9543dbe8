"""Turns of a conversation on the cache of a pruned hybrid decoder, against an uncompiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.hooked import float64_selector
from dartfx.tools.zoo.hooks import Hooks, installed
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import CLOSE
from tests.support.turns import words

RETAIN = 6
TURNS = (5, 1, 3)  # tokens of each


def conversation(family: Family, cache: Any, at: int | None = None) -> list[Tensor]:
    """The logits of later turns on this cache; at: the position of the first token, if given."""
    logits = []
    for turn, tokens in enumerate(TURNS):
        more = {}
        if at is not None:
            more, at = {"position_ids": torch.arange(at, at + tokens)[None]}, at + tokens
        said = words(1, tokens, seed=turn)
        output = family.model(input_ids=said, past_key_values=cache, use_cache=True, **more)
        logits.append(output.logits)
    return logits


def by_hooks(family: Family) -> list[Tensor]:
    """The same conversation with the eager model, whose first call is pruned by hooks."""
    inputs, layer = family.make_inputs("one"), family.structure.layer
    where = {"image_token_id": family.image_token_id, "decoder": family.decoder}
    hooks = Hooks(family.model, inputs, layer, RETAIN, float64_selector, **where)
    with installed(hooks, "uniform"):
        cache = family.model(**inputs, use_cache=True).past_key_values
    # Of an image's tokens M-RoPE counts the longer side.
    delta = getattr(getattr(family.model, "model", None), "rope_deltas", None)
    skipped = 0 if delta is None else int(delta)
    return conversation(family, cache, inputs["input_ids"].shape[1] + skipped)


@pytest.mark.parametrize(
    "name",
    ["lfm2_vl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nemotron_h_omni", "qwen3_5"))],
)
def test_turns_after_an_image(name: str) -> None:
    family = load(name)
    with torch.no_grad():
        right = by_hooks(family)
        dartfx.compile(family.model, retain_tokens=RETAIN, layer=family.structure.layer,
                       lowering="eager", on_unsupported="error")  # fmt: skip
        cache = family.model(**family.make_inputs("one"), use_cache=True).past_key_values
        assert cache.get_seq_length() == family.make_inputs("one")["input_ids"].shape[1]
        ours = conversation(family, cache)
    dartfx.uncompile(family.model)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
