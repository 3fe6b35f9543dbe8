"""generate() with pruned prefills, in its usual forms, against models pruned by hooks."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import TextStreamer

import dartfx
from dartfx.tools.zoo import hooked
from tests.support.generating import (
    FAMILIES,
    NAMES,
    by_hooks,
    dropped,
    family,
    fast,
    pruned,
    settings_of,
    shared,
    without_mask,
)
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

pytestmark = pytest.mark.shares_compiled

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
    ours = fast(built, kv_layout=layout).generate(**inputs, **settings_of({"output_logits": True}))
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
    ours = shared(name).generate(**inputs, **settings_of(how))
    assert dropped(ours) == built.tokens_per_image - RETAIN
    assert ours.sequences.tolist() == oracle.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, oracle.sequences_scores, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_different_numbers_of_images_decode_exactly(name: str) -> None:
    """Rows with fewer vision tokens lose pads, so the decode mask is gathered like the caches."""
    built = family(name)
    inputs = built.make_inputs("ragged")
    oracle = by_hooks(built, inputs, "uniform", output_logits=True)
    ours = shared(name).generate(**inputs, **settings_of({"output_logits": True}))
    assert dropped(ours) > 0
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)


def test_samples_with_a_fixed_seed() -> None:
    built = family("llava")
    inputs = built.make_inputs()
    how = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    torch.manual_seed(4)
    oracle = by_hooks(built, inputs, "uniform", copies=3, **how)
    torch.manual_seed(4)
    ours = shared("llava").generate(**inputs, **settings_of(how))
    assert dropped(ours) == built.tokens_per_image - RETAIN
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
        ours = model.generate(**inputs, **settings_of(how))
        assert ours.sequences.tolist() == oracle.sequences.tolist(), how
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)
    assert pruned() == 2, "one prefill for all but the one that returns hidden states"


def test_without_a_cache_every_step_is_a_pruned_prefill() -> None:
    built = family("llava")
    inputs, model = built.make_inputs(), fast(built)
    ours = model.generate(**inputs, **settings_of({"max_new_tokens": 5, "use_cache": False}))
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
    how = settings_of({"streamer": streamer, "max_new_tokens": 3})
    ours = shared("llava").generate(**inputs, **how)
    assert dropped(ours) == built.tokens_per_image - RETAIN
    new = ours.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert capsys.readouterr().out.split() == [f"<{i}>" for i in new]


@pytest.mark.parametrize("kept", [3, *slow(1)])
def test_logits_to_keep(kept: int) -> None:
    built = family("llava")
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with torch.no_grad():
        logits = shared("llava")(**inputs, logits_to_keep=kept, use_cache=False).logits
    torch.testing.assert_close(logits, oracle.logits[:, -kept:], **CLOSE)


# --- a cache of text (those of images: test_turns.py) ----------------------------------------


def test_a_second_turn_on_an_unpruned_cache() -> None:
    built = family("llava")
    text = built.make_inputs("text")

    def two_turns(model: Any) -> list[int]:
        how = settings_of({"max_new_tokens": 4})
        first = model.generate(**text, **how)
        more = torch.cat([first.sequences, first.sequences[:, -4:]], 1)
        cache = first.past_key_values
        return model.generate(input_ids=more, past_key_values=cache, **how).sequences.tolist()

    assert two_turns(shared("llava")) == two_turns(built.model)


# --- threads, wrappers -----------------------------------------------------------------------


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
        model.generate(**prompts[-1], **settings_of({"max_new_tokens": 2}))

    def many(place: int) -> list[Any]:
        how = settings_of({"max_new_tokens": 2})
        runs = (models[place].generate(**prompts[place], **how) for _ in range(50))
        return [run.sequences.tolist() for run in runs]

    with ThreadPoolExecutor(2) as threads:
        for place, runs in enumerate(threads.map(many, range(2))):
            assert runs == [alone[place]] * 50


def test_explain_notes_generate_of_a_wrapper() -> None:
    built = family("llava")
    model = copy.deepcopy(built.model)
    inputs = built.make_inputs()
    wrapper = torch.compile(model, backend="dart", options={"retain_tokens": RETAIN})
    explanation = dartfx.explain(wrapper.generate, **inputs, max_new_tokens=1)
    assert "runs the original model" in str(explanation)
    del wrapper
    gc.collect()
    assert "original" not in str(dartfx.explain(model.generate, **inputs, max_new_tokens=1))
