"""generate() with pruned prefills, in the ways people call it, against models pruned by hooks."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import CompileConfig, TextStreamer

import dartfx
from dartfx.model.caches.kv_cache import pruned_length
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

NAMES = ["llava", "qwen2_5_vl"]
FAMILIES = [NAMES[0], *slow(*NAMES[1:])]


@functools.cache
def family(name: str) -> Family:
    return load(name, layers=3)


def fast(built: Family, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    return dartfx.compile(copy.deepcopy(built.model), **settings)


def pruned() -> int:
    return sum(isinstance(r.outcome, Pruned) for r in dartfx.reports())


def by_hooks(
    built: Family, inputs: Inputs, layout: hooked.KvLayout, copies: int = 1, **how: Any
) -> Any:
    """``generate`` of the eager model pruned by hooks; copies: rows that it makes of each row."""
    rows = {
        name: value.repeat_interleave(copies, 0) if value.shape[0] == batch_of(inputs) else value
        for name, value in inputs.items()
    }
    hooks = hooks_of.Hooks(built.model, rows, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, layout):
        return built.model.generate(**inputs, **told(how))


def batch_of(inputs: Inputs) -> int:
    return int(inputs["input_ids"].shape[0])


def told(how: dict[str, Any]) -> dict[str, Any]:
    return {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True} | how


def without_mask(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


# --- layouts, searches, samples -------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "layout"), [("one", "layered"), ("pad4", "uniform"), *slow(("one", "uniform"))]
)
def test_sixteen_greedy_tokens(name: str, variant: str, layout: hooked.KvLayout) -> None:
    built = family(name)
    inputs = built.make_inputs(variant)
    if layout == "layered":
        inputs = without_mask(inputs)
    oracle = by_hooks(built, inputs, layout, output_logits=True)
    ours = fast(built, kv_layout=layout).generate(**inputs, **told({"output_logits": True}))
    assert pruned() == 1
    assert ours.sequences.tolist() == oracle.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)
    lengths = [layer.keys.shape[2] for layer in ours.past_key_values.layers]
    assert lengths == [layer.keys.shape[2] for layer in oracle.past_key_values.layers]


@pytest.mark.parametrize("name", FAMILIES)
def test_beam_search(name: str) -> None:
    built = family(name)
    inputs = built.make_inputs("pad2")
    how = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    oracle = by_hooks(built, inputs, "uniform", copies=4, **how)
    ours = fast(built).generate(**inputs, **told(how))
    assert pruned() == 1
    assert ours.sequences.tolist() == oracle.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, oracle.sequences_scores, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_different_numbers_of_images_decode_exactly(name: str) -> None:
    """Rows with fewer vision tokens lose pads, so the decode mask is gathered like the caches."""
    built = family(name)
    inputs = built.make_inputs("ragged")
    oracle = by_hooks(built, inputs, "uniform", output_logits=True)
    model = fast(built)
    ours = model.generate(**inputs, **told({"output_logits": True}))
    assert pruned() == 1
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)


def test_samples_with_a_fixed_seed() -> None:
    built = family("llava")
    inputs = built.make_inputs()
    how = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    torch.manual_seed(4)
    oracle = by_hooks(built, inputs, "uniform", copies=3, **how)
    model = fast(built)
    torch.manual_seed(4)
    ours = model.generate(**inputs, **told(how))
    assert pruned() == 1
    assert ours.sequences.tolist() == oracle.sequences.tolist()
    assert len({tuple(row) for row in ours.sequences.tolist()}) > 1


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 3},
    {"bad_words_ids": [[7], [150]]},
    {"output_hidden_states": True},
    {"output_scores": True, "output_logits": True},
]


def test_options_of_generate_one_by_one() -> None:
    built = family("llava")
    inputs, model = built.make_inputs(), fast(built, kv_layout="uniform")
    for how in OPTIONS:
        how = {"output_logits": True, "max_new_tokens": 4} | how
        oracle = by_hooks(built, inputs, "uniform", **how)
        ours = model.generate(**inputs, **told(how))
        assert ours.sequences.tolist() == oracle.sequences.tolist(), how
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)
    assert pruned() == 2, "one prefill for all but the one that returns hidden states"


def test_without_a_cache_every_step_is_a_pruned_prefill() -> None:
    built = family("llava")
    inputs, model = built.make_inputs(), fast(built)
    ours = model.generate(**inputs, **told({"max_new_tokens": 5, "use_cache": False}))
    assert pruned() <= 3, "the length becomes dynamic"
    ids = inputs["input_ids"]
    for _ in range(5):
        longer = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = hooked.pruned_forward(built.model, longer, retain=RETAIN).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert ours.sequences.tolist() == ids.tolist()


class Words:
    """All that TextStreamer asks of a tokenizer."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{i}> " for i in ids)


@pytest.mark.slow
def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    """``test_inference.py`` streams in threads."""
    built = family("llava")
    inputs = built.make_inputs()
    streamer = TextStreamer(Words(), skip_prompt=True)
    ours = fast(built).generate(**inputs, **told({"streamer": streamer, "max_new_tokens": 3}))
    assert pruned() == 1
    new = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert capsys.readouterr().out.split() == [f"<{i}>" for i in new]


@pytest.mark.parametrize("kept", [3, *slow(1)])
def test_logits_to_keep(kept: int) -> None:
    built = family("llava")
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with torch.no_grad():
        logits = fast(built)(**inputs, logits_to_keep=kept, use_cache=False).logits
    assert pruned() == 1
    torch.testing.assert_close(logits, oracle.logits[:, -kept:], **CLOSE)


# --- a cache of text (those of images: test_turns.py) ----------------------------------------


def test_a_second_turn_on_an_unpruned_cache() -> None:
    built = family("llava")
    text = built.make_inputs("text")
    model = fast(built)

    def two_turns(model: Any) -> list[int]:
        how = told({"max_new_tokens": 4})
        first = model.generate(**text, **how)
        more = torch.cat([first.sequences, first.sequences[:, -4:]], 1)
        cache = first.past_key_values
        return model.generate(input_ids=more, past_key_values=cache, **how).sequences.tolist()

    assert two_turns(model) == two_turns(built.model)


# --- static caches --------------------------------------------------------------------------


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
        ours = model.generate(**inputs, **told(how))
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
    ours = model.generate(**inputs, **told({}))
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


# --- compilations, memory, wrappers ---------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("decode", [None, "static"])
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


def test_two_models_in_two_threads_share_nothing() -> None:
    """Masks, notes and reports belong to the call that made them."""
    models, prompts, alone = [], [], []
    for name in NAMES:
        torch.compiler.reset()
        model, inputs = fast(family(name)), family(name).make_inputs()
        oracle = by_hooks(family(name), inputs, "uniform", max_new_tokens=2)
        models.append(model)
        prompts.append(without_mask(inputs))
        alone.append(oracle.sequences.tolist())
        model.generate(**prompts[-1], **told({"max_new_tokens": 2}))

    def many(place: int) -> list[Any]:
        how = told({"max_new_tokens": 2})
        runs = (models[place].generate(**prompts[place], **how) for _ in range(50))
        return [run.sequences.tolist() for run in runs]

    with ThreadPoolExecutor(2) as threads:
        for place, runs in enumerate(threads.map(many, range(2))):
            assert runs == [alone[place]] * 50


def test_generate_of_a_wrapper_is_told_by_explain() -> None:
    built = family("llava")
    model = copy.deepcopy(built.model)
    inputs = built.make_inputs()
    wrapper = torch.compile(model, backend="dart", options={"retain_tokens": RETAIN})
    told = dartfx.explain(wrapper.generate, **inputs, max_new_tokens=1)
    assert "runs the original model" in str(told)
    del wrapper
    gc.collect()
    assert "original" not in str(dartfx.explain(model.generate, **inputs, max_new_tokens=1))
