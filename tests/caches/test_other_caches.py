"""Caches that hold quantisation codes, or tokens of an earlier call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

import dartfx
from dartfx.model.caches.counting import held_tokens
from dartfx.model.caches.kv_cache import mark_pruned, pruned_length, require_fitting
from dartfx.model.caches.weights import Weights
from dartfx.runtime.keep_idx import KeepIdxRecord
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN
from tests.support.turns import Conversation

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


class Elsewhere(DynamicLayer):
    """A layer that keeps its first tokens under a name of its own, as Unlimited-OCR's does."""

    first: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.first, self.second = key_states, value_states
            return key_states, value_states
        keys, values = super().update(key_states, value_states)
        return torch.cat([self.first, keys], -2), torch.cat([self.second, values], -2)

    def get_seq_length(self) -> int:
        return self.first.shape[-2] + super().get_seq_length() if self.is_initialized else 0


def elsewhere() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Elsewhere() for _ in range(3)]
    return cache


def test_no_image_is_pruned_into_layers_that_keep_tokens_elsewhere() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    settings = {"max_new_tokens": 3, "do_sample": False}
    right = built.model.generate(**inputs, **settings)
    model = dartfx.compile(built.model, **OPTIONS)
    with pytest.warns(dartfx.PruningWarning, match=r"\(Elsewhere\) keep tokens in a way"):
        ours = model.generate(**inputs, **settings, past_key_values=elsewhere())
    assert torch.equal(ours, right)


def test_a_cache_that_a_pruned_prompt_filled_elsewhere_is_not_continued() -> None:
    """Where the model makes the cache, that shows after the prompt only."""
    cache, states = elsewhere(), torch.zeros(1, 1, 3, 2)
    cache.update(states, states, 0)
    mark_pruned(cache, 5, [KeepIdxRecord(torch.tensor([[0, 2, 4]]))])
    with pytest.raises(dartfx.SelectionError, match=r"\(Elsewhere\) keep tokens in a way"):
        require_fitting([cache], 1, Weights(torch.nn.Linear(1, 1)))


def test_a_text_prompt_fills_a_quantised_cache() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("text")
    right = built.model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    model = dartfx.compile(built.model, on_unsupported="error", **OPTIONS)
    ours = model.generate(**inputs, max_new_tokens=4, **QUANTISED)
    torch.testing.assert_close(ours.logits, right.logits, **CLOSE)


@pytest.mark.parametrize("variant", ["pad2", *slow("one")])
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


def test_an_image_is_pruned_on_a_quantised_cache_of_text() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    del inputs["attention_mask"]
    text = torch.randint(2, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    settings = built.model.config.get_text_config()
    cache, whole = QuantizedCache("fp8", settings), QuantizedCache("fp8", settings)
    oracle = Conversation(built, cache=whole)
    oracle.say(text)
    right = oracle.show(inputs)
    model = dartfx.compile(copy.deepcopy(built.model), on_unsupported="error", **OPTIONS)
    with torch.no_grad():
        model(input_ids=text, past_key_values=cache)
        ours = model(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(ours, right, **CLOSE)
    dropped = built.tokens_per_image - RETAIN
    for layer, full in zip(cache.layers, whole.layers, strict=True):
        assert layer.get_seq_length() == full.get_seq_length()
        assert held_tokens(layer) == full.get_seq_length() - dropped
