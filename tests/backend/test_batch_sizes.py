"""One compiled model called with several batch sizes, where experts flatten tokens.

A product dim (B * S) is then known only from views after the first use of its size.
"""

from __future__ import annotations

import pytest
import torch

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.registry import load
from tests.support.families import generate
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@pytest.mark.parametrize(
    ("name", "steps"), [("kimi_k25", 1), *slow(("kimi_k25", 3), ("qwen3_vl_moe", 3))]
)
def test_one_row_and_then_several(name: str, steps: int) -> None:
    torch.compiler.reset()
    dartfx.reset()
    family = load(name, layers=4)
    model = dartfx.compile(
        family.model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error"
    )
    compiled = model._compiled_call_impl
    for variant in ("one", "pad2"):
        inputs = family.make_inputs(variant)
        model._compiled_call_impl = compiled
        logits = generate(model, inputs, steps)
        model._compiled_call_impl = None
        oracle = hooked.pruned_generate(
            model,
            inputs,
            decoder=family.decoder,
            image_token_id=family.image_token_id,
            layer=family.structure.layer,
            latent_cache=family.structure.latent_cache,
            retain=RETAIN,
            max_new_tokens=steps,
            kv_layout="uniform",
        )
        torch.testing.assert_close(logits, oracle.logits, **CLOSE)
    assert sum(r.pruned for r in dartfx.reports()) == 2
