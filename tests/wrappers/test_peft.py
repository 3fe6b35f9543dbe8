"""Models with PEFT adapters: compiled before or after, adapters switched and merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

peft = pytest.importorskip("peft")
# PEFT reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

OPTIONS: dict[str, Any] = {
    "retain_tokens": RETAIN,
    "lowering": "eager",
    "on_unsupported": "error",
}


def with_adapters(model: nn.Module, seed: int = 0) -> Any:
    """LoRA adapters "default" and "other" that both change something."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings)
    wrapped.add_adapter("other", settings)
    return wrapped.eval()


@pytest.fixture
def built() -> Family:
    return load("llava", layers=3)


COMPILED: dict[str, Callable[[Any], nn.Module]] = {
    "the wrapper": lambda wrapped: wrapped,
    "the tuner": lambda wrapped: wrapped.base_model,
    "the model": lambda wrapped: wrapped.get_base_model(),
}


def assert_prunes(call: Any, built: Family, inside: nn.Module) -> None:
    """Logits of the wrapper's forward are those of the adapted model pruned by hooks."""
    inputs = built.make_inputs("one")
    compiled = inside._compiled_call_impl
    inside._compiled_call_impl = None
    try:
        oracle = hooked.pruned_forward(inside, inputs, retain=RETAIN)
    finally:
        inside._compiled_call_impl = compiled
    with torch.no_grad():
        torch.testing.assert_close(call(**inputs).logits, oracle.logits, **CLOSE)


@pytest.mark.parametrize("chosen", ["the wrapper", *slow("the tuner", "the model")])
def test_forward_and_generate_are_pruned(chosen: str, built: Family) -> None:
    wrapped = with_adapters(built.model)
    target = COMPILED[chosen](wrapped)
    assert dartfx.compile(target, **OPTIONS) is target
    assert_prunes(wrapped, built, wrapped.get_base_model())
    tokens = wrapped.generate(**built.make_inputs("one"), max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] > 1
    assert any(report.pruned for report in dartfx.reports())
    dartfx.uncompile(target)
    assert wrapped.get_base_model()._compiled_call_impl is None


def test_compiled_before_the_adapters(built: Family) -> None:
    dartfx.compile(built.model, **OPTIONS)
    wrapped = with_adapters(built.model)
    assert_prunes(wrapped, built, built.model)


def test_adapters_switched_disabled_and_merged(built: Family) -> None:
    wrapped = dartfx.compile(with_adapters(built.model), **OPTIONS)
    inside = wrapped.get_base_model()
    assert_prunes(wrapped, built, inside)
    wrapped.set_adapter("other")
    assert_prunes(wrapped, built, inside)
    with wrapped.disable_adapter():
        assert_prunes(wrapped, built, inside)
    wrapped.merge_adapter()
    assert_prunes(wrapped, built, inside)
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    assert_prunes(merged, built, merged)


def test_explain_looks_inside(built: Family) -> None:
    wrapped, inputs = with_adapters(built.model), built.make_inputs("one")
    options = {"retain_tokens": RETAIN}
    assert dartfx.explain(wrapped, **inputs, options=options).pruned
    torch.compiler.reset()
    assert dartfx.explain(wrapped.generate, **inputs, max_new_tokens=1, options=options).pruned


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_a_training_step(built: Family) -> None:
    """Gradients of the adapters alone, with inputs that require them, as checkpointing wants."""
    wrapped = with_adapters(built.model).train()
    inputs = built.make_inputs("one")
    inside = wrapped.get_base_model()
    hooks = hooks_of.Hooks(inside, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "layered"), torch.enable_grad():
        expected = inside(**inputs, use_cache=True).logits
    parameters = [p for p in wrapped.parameters() if p.requires_grad]

    def gradients(logits: torch.Tensor) -> Any:
        loss = F.softmax(logits, -1).square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    right = gradients(expected)
    wrapped.enable_input_require_grads()
    dartfx.compile(wrapped, **OPTIONS)
    found = wrapped(**inputs, use_cache=False).logits
    for one, other in zip(gradients(found), right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **CLOSE)
