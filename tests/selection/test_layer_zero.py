"""Pruning before the first decoder layer, against an eager model whose hooks do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.errors import ConfigError
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked, oracle
from dartfx.tools.zoo.registry import load
from tests.support.families import PROMPTS, fresh
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS: dict[str, Any] = {
    "retain_tokens": RETAIN,
    "layer": 0,
    "selector": "uniform",
    "lowering": "eager",
    "on_unsupported": "error",
}


def evenly(given: hooked.SelectionInputs, retain: int) -> Tensor:
    """The middle token of each of R equal bins of a row's vision tokens, by the batch rule."""

    def choose(b: int, pool: list[int], after: list[int], budget: int) -> oracle.Selection:
        total = len(pool)
        steps = [(t * budget + total // 2) // total for t in range(total + 1)]
        return oracle.Selection([p for t, p in enumerate(pool) if steps[t + 1] > steps[t]])

    return torch.tensor(oracle.by_batch_rule(choose, given.vision, retain, given.valid).keep_idx)


def generate(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize(("name", "variant"), PROMPTS)
def test_generate(name: str, variant: str) -> None:
    family = fresh(name)
    inputs = family.make_inputs(variant)
    reference = hooked.pruned_generate(
        family.model,
        inputs,
        layer=0,
        retain=RETAIN,
        max_new_tokens=2,
        selector=evenly,
        kv_layout="uniform",
    )
    dartfx.compile(family.model, **OPTIONS)
    output = generate(family.model, inputs)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], reference.token_ids)
    torch.testing.assert_close(torch.stack(output.logits, 1), reference.logits, **CLOSE)
    assert [e.keys.shape[2] for e in output.past_key_values.layers] == reference.kv_lengths
    (pruned,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert (pruned.layer, pruned.retained, pruned.kv_layout) == (0, RETAIN, "uniform")


@pytest.mark.parametrize("dynamic", [True, *slow(False)])
def test_every_layer_is_short(dynamic: bool) -> None:
    family = load("llava", layers=3)
    inputs = family.make_inputs("one")
    reference = hooked.pruned_forward(
        family.model, inputs, layer=0, retain=RETAIN, selector=evenly, kv_layout="uniform"
    )
    fast = torch.compile(
        family.model, backend="dart", fullgraph=True, dynamic=dynamic, options=OPTIONS
    )
    output = fast(**inputs)
    torch.testing.assert_close(output.logits, reference.logits, **CLOSE)
    (pruned,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert {e.keys.shape[2] for e in output.past_key_values.layers} == {pruned.sequence[1]}


@pytest.mark.parametrize("selector", ["dart", "fastv", "relevant", "tiled"])
def test_selectors_that_read_keys_are_refused(selector: str) -> None:
    with pytest.raises(ConfigError, match=rf"layer=0, but selector='{selector}'.*layer=1.*uniform"):
        dartfx.DartConfig(layer=0, selector=selector)
    with pytest.raises(ConfigError, match="layer=0"):
        dartfx.DartConfig(layer=(0, 2), retain_tokens=(9, 6), selector=selector)
