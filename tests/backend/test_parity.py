"""The compiled model against the eager one pruned by hooks with the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@pytest.fixture(scope="module", params=["llava", *slow("llava_next"), "qwen2_5_vl"])
def family(request: pytest.FixtureRequest) -> Family:
    return load(request.param, layers=3)


def pruned_reports() -> list[Pruned]:
    return [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]


def assert_same_prefill(output: Any, oracle: hooked.Pruned) -> None:
    torch.testing.assert_close(output.logits, oracle.logits, **CLOSE)
    assert [e.keys.shape[2] for e in output.past_key_values.layers] == oracle.kv_lengths
    for entry, keys, values in zip(
        output.past_key_values.layers, oracle.keys, oracle.values, strict=True
    ):
        torch.testing.assert_close(entry.keys, keys, **CLOSE)
        torch.testing.assert_close(entry.values, values, **CLOSE)


@pytest.mark.parametrize(
    ("family", "layout", "masked"),
    [
        ("llava", "layered", False),
        ("llava", "uniform", True),
        ("qwen2_5_vl", "layered", False),
        *slow(("qwen2_5_vl", "uniform", True), ("llava_next", "uniform", True)),
    ],
    indirect=["family"],
)
def test_forward(family: Family, layout: str, masked: bool) -> None:
    inputs = family.make_inputs()
    if not masked:
        del inputs["attention_mask"]
    oracle = hooked.pruned_forward(family.model, inputs, retain=RETAIN, kv_layout=layout)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "kv_layout": layout}
    whole = family.name == "llava"  # dynamo breaks the forwards of the other two
    fast = torch.compile(family.model, backend="dart", options=options, fullgraph=whole)
    assert_same_prefill(fast(**inputs), oracle)
    (report,) = pruned_reports()
    assert report.sequence == (inputs["input_ids"].shape[1], oracle.keep_idx.shape[1])
    assert report.kv_layout == layout


def generate(model: Any, inputs: dict[str, Tensor], steps: int) -> Any:
    try:
        return model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model._compiled_call_impl = None


def test_generate(family: Family) -> None:
    """With graph breaks allowed; in one graph below."""
    inputs = family.make_inputs()
    oracle = hooked.pruned_generate(
        family.model, inputs, retain=RETAIN, max_new_tokens=8, kv_layout="layered"
    )
    options = {"retain_tokens": RETAIN, "lowering": "eager"}
    family.model.compile(backend="dart", options=options)
    output = generate(family.model, inputs, 8)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], oracle.token_ids)
    torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
    assert [e.keys.shape[2] for e in output.past_key_values.layers] == oracle.kv_lengths
    assert len(pruned_reports()) == 1


def test_padded_batch(family: Family) -> None:
    inputs = family.make_inputs("pad4")
    oracle = hooked.pruned_generate(
        family.model, inputs, retain=RETAIN, max_new_tokens=6, kv_layout="uniform"
    )
    family.model.compile(
        backend="dart", options={"retain_tokens": RETAIN, "lowering": "eager"}, fullgraph=True
    )
    output = generate(family.model, inputs, 6)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], oracle.token_ids)
    torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
    (report,) = pruned_reports()
    assert report.kv_layout == "uniform"


@pytest.mark.parametrize("family", ["llava", *slow("llava_next", "qwen2_5_vl")], indirect=True)
def test_through_inductor(family: Family) -> None:
    inputs = family.make_inputs()
    # The prefill alone in make test; decode has a symbolic length from the third token on.
    steps = {"llava": 1, "qwen2_5_vl": 2, "llava_next": 4}[family.name]
    oracle = hooked.pruned_generate(
        family.model, inputs, retain=RETAIN, max_new_tokens=steps, kv_layout="uniform"
    )
    dartfx.compile(family.model, retain_tokens=RETAIN)
    output = generate(family.model, inputs, steps)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], oracle.token_ids)
    torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
