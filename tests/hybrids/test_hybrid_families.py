"""Hybrid decoders of the zoo in padded batches through generate, and their caches' contents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dartfx
from dartfx.tools.zoo.hooked import pruned_generate
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import EAGER

STEPS = 4
RETAIN = 6


FAMILIES = [
    "lfm2_vl",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("nemotron_h_omni", "qwen3_5")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_of_a_padded_pair(name: str) -> None:
    family = load(name)
    inputs = family.make_inputs("pad2")
    layer, length = family.structure.layer, {"max_new_tokens": STEPS}
    model: Any = dartfx.compile(family.model, retain_tokens=RETAIN, layer=layer, lowering="eager")
    try:
        output = model.generate(
            **inputs,
            **length,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        dartfx.uncompile(model)
    assert any(report.pruned for report in dartfx.reports())
    # Nor is its tower, which hides padded patches, taken for a prompt without a vision mask.
    assert not any(getattr(report.outcome, "unsure", False) for report in dartfx.reports())
    oracle = pruned_generate(
        family.model,
        inputs,
        layer=layer,
        retain=RETAIN,
        kv_layout="uniform",
        image_token_id=family.image_token_id,
        decoder=family.decoder,
        **length,
    )
    logits = torch.stack(output.logits, 1)
    torch.testing.assert_close(logits, oracle.logits, **EAGER)
    assert torch.equal(output.sequences[:, -STEPS:], oracle.token_ids)
