"""``dartfx.compile``, ``dartfx.explain``, ``dartfx.reports`` and ``dartfx.reset``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dartfx
from dartfx.observe.report import as_json
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.families import called
from tests.support.plain.decoders import Decoder, Sizes, prompt
from tests.support.tolerances import CLOSE, RETAIN


@pytest.fixture(scope="module")
def llava() -> Family:
    return called("llava")


@pytest.fixture(autouse=True)
def uncompiled_afterwards(llava: Family) -> Iterator[None]:
    yield
    llava.model._compiled_call_impl = None


def test_compile_serves_calls_and_generate(llava: Family) -> None:
    inputs = llava.make_inputs()
    forward = hooked.pruned_forward(llava.model, inputs, retain=RETAIN, kv_layout="uniform")
    generated = hooked.pruned_generate(
        llava.model, inputs, retain=RETAIN, max_new_tokens=3, kv_layout="uniform"
    )
    model = dartfx.compile(llava.model, retain_tokens=RETAIN, lowering="eager")
    assert model is llava.model
    torch.testing.assert_close(model(**inputs).logits, forward.logits, **CLOSE)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], generated.token_ids)
    pruned = [r for r in dartfx.reports() if r.pruned]
    assert len(pruned) == 2
    dartfx.reset()
    assert dartfx.reports() == []


def test_compile_on_a_model_that_never_ran_and_breaks() -> None:
    """A cold model whose forward dynamo cannot hold in one graph."""
    family = load("llava_next", layers=3)
    inputs = family.make_inputs()
    model = dartfx.compile(family.model, retain_tokens=RETAIN, lowering="eager")
    logits = model(**inputs).logits
    model._compiled_call_impl = None
    oracle = hooked.pruned_forward(model, inputs, retain=RETAIN, kv_layout="uniform")
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)


def test_compile_wants_a_module_and_known_options(llava: Family) -> None:
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, got function"):
        dartfx.compile(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(dartfx.ConfigError, match=r"layr.*layer"):
        dartfx.compile(llava.model, layr=2)


def test_explain_tells_all_of_the_cut(llava: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("explain compiles nothing")

    monkeypatch.setattr(inductor, "compile_fx", refuse)
    inputs = llava.make_inputs()
    explanation = dartfx.explain(llava.model, **inputs, options={"retain_tokens": RETAIN})
    text = str(explanation)
    assert explanation.pruned
    before = inputs["input_ids"].shape[1]
    for line in (
        "pruned before decoder layer 2 of L['self'].model.language_model.layers",
        "vision tokens: 16 per sample (merge in the graph), 6 retained",
        f"sequence:      {before} -> {before - 10} tokens, batch 1",
        "decoder FLOPs:",
        "crosses the cut, gathered once each (4 values)",
        "hidden_states = residual + hidden_states",
    ):
        assert line in text
    assert dartfx.reports() == [], "an explanation is no compilation"
    assert llava.model._compiled_call_impl is None


def test_explain_generate_and_the_options_a_model_was_compiled_with(llava: Family) -> None:
    dartfx.compile(llava.model, retain_tokens=RETAIN, layer=1)
    text = str(dartfx.explain(llava.model.generate, **llava.make_inputs(), max_new_tokens=2))
    assert "before decoder layer 1" in text
    assert "6 retained" in text
    assert "uniform" in text


def test_explain_a_refusal() -> None:
    explanation = dartfx.explain(Decoder(), **prompt(Sizes()), options={"layer": 9})
    assert not explanation.pruned
    assert "NOT pruned: layer=9" in str(explanation)
    assert "try:   a layer from 0 to" in str(explanation)


def test_explain_a_text_prompt(llava: Family) -> None:
    text = dartfx.explain(llava.model, **llava.make_inputs("text"))
    assert "nothing to prune: this call carries no vision tokens" in str(text)


def test_explain_tells_when_there_is_nothing_to_drop() -> None:
    z = Sizes()
    text = str(dartfx.explain(Decoder(z), **prompt(z), options={"retain_tokens": 99}))
    assert f"nothing to drop: 99 tokens to retain of {z.vision}" in text
    assert "no vision tokens\n" not in text + "\n"


def test_explain_wants_a_model() -> None:
    with pytest.raises(TypeError, match="needs a model or a method of one"):
        dartfx.explain(len, [1])


def test_explain_says_when_dynamo_made_no_graph() -> None:
    assert "no graph" in str(dartfx.explain(nn.Identity(), 3))


def test_reports_as_json() -> None:
    declined = dartfx.Report(0, 5, Declined("because", "here", "that"))
    assert json.loads(as_json(declined)) == {
        "graph": 0,
        "nodes": 5,
        "kind": "declined",
        "because": "because",
        "where": "here",
        "advice": "that",
        "broken_may_do": False,
        "compile": {"seconds": {}, "kernels": 0, "cached": False, "outlined": [], "flat": ""},
    }


def test_a_pruned_report_gives_every_figure(llava: Family) -> None:
    inputs = llava.make_inputs()
    del inputs["attention_mask"]
    model = torch.compile(
        llava.model,
        backend="dart",
        fullgraph=True,
        options={"retain_tokens": RETAIN, "lowering": "eager"},
    )
    output = model(**inputs)
    (pruned,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    caches = [t for e in output.past_key_values.layers for t in (e.keys, e.values)]
    assert pruned.kv_layout == "layered"
    assert pruned.kv_bytes[1] == sum(t.numel() * t.element_size() for t in caches)
    before, after = pruned.sequence
    one_layer = pruned.kv_bytes[0] // len(output.past_key_values.layers)
    assert pruned.kv_bytes[0] - pruned.kv_bytes[1] == (
        one_layer * (len(output.past_key_values.layers) - 2) * (before - after) // before
    )
    assert pruned.flops[1] < pruned.flops[0]
    assert {"normalise", "locate", "axes", "insert", "gather", "shrink", "check"} <= set(
        pruned.seconds
    )
