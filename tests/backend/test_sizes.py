"""Lengths, images and sizes that change between calls or coincide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.families import BARE, bare, called, tower_outside
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@pytest.fixture(scope="module")
def llava() -> Family:
    return called("llava")


def outcomes(kind: type) -> list[Any]:
    return [r.outcome for r in dartfx.reports() if isinstance(r.outcome, kind)]


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, 64),
        ({"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 32}, 32),
        *slow(
            ({"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 48}, 48),
            ({"hidden_size": 128, "num_attention_heads": 4}, 32),
        ),
    ],
    ids=["hidden", "heads", "vocabulary", "head"],
)
def test_sizes_that_coincide_with_the_sequence(sizes: dict[str, int], length: int) -> None:
    family = load("llava", layers=3, **sizes)
    inputs = family.make_inputs(length=length)
    assert inputs["input_ids"].shape[1] == length
    oracle = hooked.pruned_forward(family.model, inputs, retain=RETAIN, kv_layout="uniform")
    torch.testing.assert_close(bare(family)(**inputs).logits, oracle.logits, **CLOSE)


def test_batch_times_tokens_coincides_with_the_hidden_size() -> None:
    family = load("llava", layers=3, hidden_size=64, num_attention_heads=4)
    inputs = family.make_inputs("pad2", length=32)
    oracle = hooked.pruned_forward(family.model, inputs, retain=RETAIN, kv_layout="uniform")
    torch.testing.assert_close(bare(family)(**inputs).logits, oracle.logits, **CLOSE)


@pytest.mark.parametrize("dynamic", [True, *slow(None)])
def test_other_prompt_lengths_do_not_recompile(llava: Family, dynamic: bool | None) -> None:
    """Without ``dynamic`` also in ``test_generate.py``."""
    model = llava.model
    prompts = [llava.make_inputs(after=8 + extra) for extra in (0, 3, 5, 11)]
    how: Any = {"retain": RETAIN, "max_new_tokens": 4, "kv_layout": "layered"}
    oracles = [hooked.pruned_generate(model, p, **how) for p in prompts]
    model.compile(backend="dart", options=BARE, dynamic=dynamic, fullgraph=True)
    graphs = []
    try:
        for inputs, oracle in zip(prompts, oracles, strict=True):
            output = model.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
            graphs.append(len(dartfx.reports()))
    finally:
        model._compiled_call_impl = None
    assert graphs[1] == graphs[2] == graphs[3]
    assert len(outcomes(Pruned)) == (1 if dynamic else 2)


@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl")])
def test_across_graph_breaks(name: str) -> None:
    """Other lengths add no graph, and text of the same shape stays exact."""
    family = load(name, layers=3)
    family.model(**family.make_inputs())
    tower_outside(family.model)
    if name == "llava":  # Qwen2.5-VL breaks between merge and decoder of itself
        decoder = family.model.model.language_model
        decoder.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    prompts = [family.make_inputs(after=8 + extra) for extra in (0, 3, 5, 11)]
    text = family.make_inputs("text")
    where: Any = {"retain": RETAIN, "kv_layout": "uniform"}
    oracles = [hooked.pruned_forward(family.model, p, **where).logits for p in prompts]
    plain = family.model(**text).logits
    fast, graphs = bare(family, fullgraph=False), []
    for inputs, oracle in zip(prompts, oracles, strict=True):
        torch.testing.assert_close(fast(**inputs).logits, oracle, **CLOSE)
        graphs.append(len(dartfx.reports()))
    assert graphs[1] == graphs[2] == graphs[3]
    assert {p.how for p in outcomes(Pruned)} == {"merge in an earlier graph"}
    assert prompts[0]["input_ids"].shape == text["input_ids"].shape
    for _ in range(2):
        torch.testing.assert_close(fast(**text).logits, plain, **CLOSE)
        torch.testing.assert_close(fast(**prompts[0]).logits, oracles[0], **CLOSE)


def test_images_of_another_size(llava: Family) -> None:
    """N follows the features, and a reduction ratio follows N, without data being read."""
    llava.model.compile(
        backend="dart",
        options={"reduction_ratio": 0.5, "lowering": "eager"},
        dynamic=True,
        fullgraph=True,
    )
    try:
        for variant, retain in (("one", 8), ("two", 16)):
            inputs = llava.make_inputs(variant)
            current, llava.model._compiled_call_impl = llava.model._compiled_call_impl, None
            oracle = hooked.pruned_generate(
                llava.model, inputs, retain=retain, max_new_tokens=1, kv_layout="layered"
            )
            llava.model._compiled_call_impl = current
            made = llava.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            torch.testing.assert_close(torch.stack(made.logits, 1), oracle.logits, **CLOSE)
    finally:
        llava.model._compiled_call_impl = None
    assert len(outcomes(Pruned)) == 2, "one for each number of images: dynamo sees a list"
