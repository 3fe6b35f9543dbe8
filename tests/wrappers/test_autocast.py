"""Autocast outside a model: around its call, or around its forward as in accelerate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.registry import load
from tests.support.families import tower_outside
from tests.support.slow import slow
from tests.support.tolerances import AUTOCAST_GRADIENTS, RETAIN

LOW = {"device_type": "cpu", "dtype": torch.bfloat16}


def around_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.autocast(**LOW)(model.forward)
    return model


def by_accelerate(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    prepared: nn.Module = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    return prepared


def inside_both(model: nn.Module) -> nn.Module:
    """The decoder leaves autocast again, so two regions are open at once."""
    decoder = model.model.language_model
    decoder.forward = torch.autocast("cpu", enabled=False)(decoder.forward)
    return around_forward(model)


WRAPS = {"decorated": around_forward, "accelerate": by_accelerate, "nested": inside_both}


@pytest.mark.parametrize(
    ("family", "how", "late"),
    [
        ("llava", "decorated", True),
        ("llava", "accelerate", False),
        ("llava", "nested", False),
        *slow(
            ("llava", "decorated", False),
            ("llava", "accelerate", True),
            ("llava", "nested", True),
            ("qwen2_5_vl", "nested", False),
            ("qwen2_5_vl", "accelerate", True),
            ("internvl", "decorated", True),
            ("internvl", "nested", False),
        ),
    ],
)
def test_logits_are_those_of_hooks(family: str, how: str, late: bool) -> None:
    """late: wrapped after it was compiled."""
    wrap, built = WRAPS[how], load(family, layers=3)
    inputs = built.make_inputs("one")
    oracle = hooked.pruned_forward(wrap(copy.deepcopy(built.model)), inputs, retain=RETAIN)
    options: dict[str, Any] = {"retain_tokens": RETAIN, "lowering": "eager"}
    model = tower_outside(copy.deepcopy(built.model))
    model = dartfx.compile(model if late else wrap(model), on_unsupported="error", **options)
    model = wrap(model) if late else model
    with torch.no_grad():
        logits = model(**inputs, use_cache=True).logits
    assert any(report.pruned for report in dartfx.reports())
    torch.testing.assert_close(logits, oracle.logits, rtol=0, atol=0)


@pytest.mark.parametrize("lowering", ["aot_eager", *slow("eager")])
def test_a_training_step_by_accelerate(lowering: str) -> None:
    """Trainer(bf16=True) prepares a model so; gradients are of float32 parameters."""
    built = load("llava", layers=3)
    inputs = built.make_inputs("one", seed=0)
    plain = by_accelerate(copy.deepcopy(built.model).train().requires_grad_(True))
    hooks = hooks_of.Hooks(plain, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "layered"), torch.enable_grad():
        expected = plain(**inputs, use_cache=True).logits
    model = copy.deepcopy(built.model).train().requires_grad_(True)
    options: dict[str, Any] = {"retain_tokens": RETAIN, "lowering": lowering}
    model = by_accelerate(dartfx.compile(model, on_unsupported="error", **options))
    found = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for logits in (found, expected):
        logits.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **AUTOCAST_GRADIENTS)
