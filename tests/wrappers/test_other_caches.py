"""Caches that hold codes, or tokens of an earlier call."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import dartfx
from dartfx.model.kv_cache import held_tokens, pruned_length
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import CLOSE, RETAIN

QUANTISED: dict[str, Any] = {
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "cache_implementation": "quantized",
    "cache_config": {"backend": "fp8"},
}
OPTIONS: dict[str, Any] = {"retain_tokens": RETAIN, "lowering": "eager"}


@pytest.mark.parametrize(("backend", "package"), [("hqq", "hqq"), ("quanto", "optimum.quanto")])
def test_caches_whose_codes_dynamo_cannot_trace_are_refused(backend: str, package: str) -> None:
    pytest.importorskip(package)
    built = load("llava", layers=3)
    model = dartfx.compile(built.model, on_unsupported="error", **OPTIONS)
    settings = {"backend": backend, "nbits": 4, "q_group_size": 32}
    with pytest.raises(
        dartfx.UnsupportedGraphError, match=r"not one graph, because[\s\S]*taken out"
    ):
        model.generate(
            **built.make_inputs("one"), max_new_tokens=2,
            **QUANTISED | {"cache_config": settings},
        )  # fmt: skip


def test_a_text_prompt_fills_a_quantised_cache() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("text")
    right = built.model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    model = dartfx.compile(built.model, on_unsupported="error", **OPTIONS)
    ours = model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    torch.testing.assert_close(ours.logits, right.logits, **CLOSE)


@pytest.mark.parametrize("variant", ["one", "pad2"])
def test_an_image_is_pruned_into_a_quantised_cache(variant: str) -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs(variant)
    hooks = hooks_of.Hooks(built.model, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "layered"):
        right = built.model.generate(**inputs, max_new_tokens=1, **QUANTISED)
    model = dartfx.compile(copy.deepcopy(built.model), on_unsupported="error", **OPTIONS)
    ours = model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    assert any(report.pruned for report in dartfx.reports())
    torch.testing.assert_close(ours.logits[0], right.logits[0], **CLOSE)
    cache, length = ours.past_key_values, inputs["input_ids"].shape[1]
    dropped = built.tokens_per_image - RETAIN
    assert pruned_length(cache) == dropped
    for layer in cache.layers:
        assert layer.get_seq_length() == length + 3
        assert held_tokens(layer) == length + 3 - dropped


def test_decode_on_a_pruned_quantised_cache() -> None:
    """Later tokens are those of the hook-pruned model, whose layers count their tokens eagerly."""
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    hooks = hooks_of.Hooks(built.model, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "layered"):
        right = built.model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    model = dartfx.compile(
        copy.deepcopy(built.model), on_unsupported="error", kv_layout="layered", **OPTIONS
    )
    ours = model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    torch.testing.assert_close(ours.logits, right.logits, **CLOSE)


@pytest.mark.parametrize("quantised", [False, True])
def test_an_image_on_a_cache_of_text_is_refused_by_name(quantised: bool) -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    text = torch.randint(2, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = dict(inputs, input_ids=torch.cat([text, inputs["input_ids"]], 1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    more: dict[str, Any] = dict(QUANTISED, max_new_tokens=1) if quantised else {"max_new_tokens": 1}
    model = dartfx.compile(built.model, on_unsupported="warn", **OPTIONS)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"past_key_values": None}
        if quantised:
            from transformers import QuantizedCache

            given["past_key_values"] = QuantizedCache("fp8", built.model.config.get_text_config())
            more.pop("cache_implementation"), more.pop("cache_config")
        cache = model(input_ids=text, use_cache=True, **given).past_key_values
        model.generate(**whole, past_key_values=cache, **more)
    told = [str(w.message) for w in caught if w.category is dartfx.PruningWarning]
    assert not any(report.pruned for report in dartfx.reports())
    assert len(told) == 1
    assert "continues a KV cache that already holds tokens" in told[0]
    assert "report" not in told[0]
