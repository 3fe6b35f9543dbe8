"""Caches filled by ``generate``: static ones, their number of graphs, their bytes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import dartfx
from dartfx.model.caches.kv_cache import pruned_length
from tests.support.generating import (
    FAMILIES,
    by_hooks,
    family,
    fast,
    pruned,
    settings_of,
    without_mask,
)
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@pytest.mark.parametrize(
    ("name", "variant"),
    [("llava", "ragged"), *slow(("llava", "one"), ("qwen2_5_vl", "pad4"))],
)
@pytest.mark.parametrize("compiles", ["dartfx", "transformers"])
def test_static_cache(name: str, variant: str, compiles: str) -> None:
    """Decode compiled by dartfx's own call, or by transformers with CompileConfig."""
    built = family(name)
    inputs = built.make_inputs(variant)
    oracle = by_hooks(built, inputs, "uniform", output_logits=True)
    how: dict[str, Any] = {"output_logits": True, "cache_implementation": "static"}
    if compiles == "transformers":
        lowering = {"lowering": "eager"}  # transformers wants a mode, torch only one of the two
        how["compile_config"] = CompileConfig(backend="dart", mode=None, options=lowering)
        how["compile_config"]._compile_all_devices = True
    model = fast(built)
    for _ in range(2):  # the second run has the same cache, emptied
        ours = model.generate(**inputs, **settings_of(how))
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)
    cache = ours.past_key_values
    assert type(cache).__name__ == "StaticCache"
    seen = inputs["input_ids"].shape[1] + 15
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {seen}
    dropped = pruned_length(cache)
    assert {int(layer.cumulative_length) for layer in cache.layers} == {seen - dropped}
    assert len(dartfx.reports()) == 2  # one prefill, one decode step


def test_decode_static_in_one_line() -> None:
    built = family("llava")
    inputs = built.make_inputs()
    model = fast(built, decode="static")
    ours = model.generate(**inputs, **settings_of({}))
    assert type(ours.past_key_values).__name__ == "StaticCache"
    assert ours.sequences.tolist() == by_hooks(built, inputs, "uniform").sequences.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decode": "statik"}, "decode is 'statik'"),
        ({"decode": "static", "kv_layout": "layered"}, "layered"),
    ],
)
def test_decode_is_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(dartfx.ConfigError, match=said):
        fast(family("llava"), **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("decode", [None, *slow("static")])
def test_ten_prompts_and_their_decode_take_few_compilations(
    name: str, decode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    built = family(name)
    model = fast(built, decode=decode)
    for i in range(10):
        inputs = built.make_inputs(before=3 + i, after=5 + 2 * i)
        model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    prefills, all_graphs = pruned(), len(dartfx.reports())
    with capsys.disabled():
        sys.stdout.write(f" {name} {decode}: {prefills} prefill, {all_graphs - prefills} decode ")
    assert 1 <= prefills <= 3
    assert 1 <= all_graphs - prefills <= 3


@pytest.mark.parametrize(("layout", "early"), [("layered", False), *slow(("uniform", True))])
def test_bytes_of_the_cache_are_the_arithmetic(layout: str, early: bool) -> None:
    built = family("llava")
    inputs = without_mask(built.make_inputs())
    with torch.no_grad():
        cache = fast(built, kv_layout=layout)(**inputs, use_cache=True).past_key_values
    text = built.model.config.text_config
    whole = inputs["input_ids"].shape[1]
    left = whole - built.tokens_per_image + RETAIN
    each = 2 * text.num_key_value_heads * text.head_dim * 4  # keys and values, fp32
    held = [
        sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
        for layer in cache.layers
    ]
    assert held == [(left if early or i >= 2 else whole) * each for i in range(len(held))]
