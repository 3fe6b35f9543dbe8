"""Decoding on sliding-window caches that pruning left shorter than their window.

The oracle decodes on caches without a window: equivalent while no window is exceeded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dartfx
from dartfx.errors import PruningWarning
from dartfx.passes.frontend.fix_windows import fix_windows
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

STEPS = 7


@pytest.fixture(scope="module", params=[*slow(100), 27], ids=["wide", "filled_while_decoding"])
def family(request: pytest.FixtureRequest) -> Family:
    """Gemma 3; 31 tokens of prompt, 21 of them left: shorter than the window of 27 or 100."""
    return load("gemma3", layers=4, sliding_window=request.param)


def generate(model: Any, inputs: dict[str, Any]) -> Any:
    try:
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        model._compiled_call_impl = None


@pytest.mark.parametrize("variant", ["one", *slow("pad2")])
def test_caches_shorter_than_the_window(family: Family, variant: str) -> None:
    inputs = family.make_inputs(variant)
    cache = DynamicCache()
    oracle = hooked.pruned_generate(
        family.model,
        {**inputs, "past_key_values": cache},
        retain=RETAIN,
        max_new_tokens=STEPS,
        kv_layout="uniform",
    )
    dartfx.compile(family.model, retain_tokens=RETAIN, lowering="eager")
    output = generate(family.model, inputs)
    torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
    (pruned,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert pruned.kv_layout == "uniform"
    window = output.past_key_values.layers[0].sliding_window - 1
    left = inputs["input_ids"].shape[1] - 10 + STEPS - 1
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    sliding = [layer.is_sliding for layer in output.past_key_values.layers]
    assert lengths == [min(left, window) if s else left for s in sliding]


@pytest.mark.parametrize("dynamic", [None, *slow(True)], ids=["numbers", "symbols"])
def test_padded_rows_in_a_window_that_is_full(dynamic: bool | None) -> None:
    """Caches of 7 tokens; what is read of the mask for them goes by how many tokens were kept."""
    family = load("gemma3", layers=4, sliding_window=8)
    inputs = family.make_inputs("pad2")
    oracle = hooked.pruned_generate(
        family.model, inputs, retain=RETAIN, max_new_tokens=STEPS, kv_layout="uniform"
    )
    options = {"dynamic": dynamic, "lowering": "eager", "on_unsupported": "error"}
    dartfx.compile(family.model, retain_tokens=RETAIN, **options)
    output = generate(family.model, inputs)
    torch.testing.assert_close(torch.stack(output.logits, 1), oracle.logits, **CLOSE)
    seen = inputs["input_ids"].shape[1] + STEPS - 1
    assert {layer.get_seq_length() for layer in output.past_key_values.layers} == {seen}


def test_refused_where_no_caller_fixes_the_token_count(family: Family) -> None:
    inputs = family.make_inputs()
    options = {"retain_tokens": RETAIN, "lowering": "eager"}
    family.model.compile(backend="dart", options=options, fullgraph=True)
    with pytest.warns(PruningWarning, match="sliding-window caches.*dartfx.compile"):
        output = generate(family.model, inputs)
    alone = generate(family.model, inputs)
    assert torch.equal(output.sequences, alone.sequences)


def test_only_what_is_no_size_becomes_a_constant() -> None:
    compiled = []

    def backend(module: Any, inputs: Any) -> Any:
        fix_windows(module.graph)
        compiled.append(module)
        return module.forward

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def tails(x: Tensor, y: Tensor, window: int, scale: int) -> Tensor:
        return x[:, -window + 1 :].sum() + x[:, -y.shape[0] :].sum() * scale

    x = torch.arange(48.0).reshape(2, 24)
    for y, window, scale, compilations in ((4, 8, 3, 1), (5, 8, 6, 1), (5, 9, 6, 2)):
        want = x[:, -window + 1 :].sum() + x[:, -y:].sum() * scale
        assert tails(x, torch.empty(y), window, scale) == want
        assert len(compiled) == compilations
