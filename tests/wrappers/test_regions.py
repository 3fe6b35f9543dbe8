"""Regions that dynamo keeps as subgraph calls: pruned, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import (
    Decoder,
    Halves,
    Layer,
    Sizes,
    assert_same,
    changed,
    compiled,
    prompt,
    pruned_by_hand,
)
from tests.support.plain.refusals import SMALL, assert_declined, assert_pruned
from tests.support.plain.spellings import Context
from tests.support.slow import slow
from tests.support.tolerances import AUTOCAST, CLOSE, RETAIN

GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it

# --- checkpoints ------------------------------------------------------------------------------


def policy(*_: Any, **__: Any) -> Any:
    return torch.utils.checkpoint.create_selective_checkpoint_contexts(
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False, "context_fn": policy},
}


def checkpointed(decoder: type[Decoder], layers: int, **options: Any) -> type[Decoder]:
    """A decoder that checkpoints as many layers at once."""

    class Checkpointed(decoder):  # type: ignore[valid-type, misc]
        def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
            x, _ = self.merge(ids, features)
            if decoder is Halves:
                torch._dynamo.graph_break()
            context, outputs = self.context(x, valid), []

            def block(x: Tensor, first: int) -> Any:
                found = []
                for layer in self.layers[first : first + layers]:
                    x, k, v = layer(x, context)
                    found += [k, v]
                return x, *found

            for first in range(0, len(self.layers), layers):
                x, *found = checkpoint(block, x, first, **options)
                outputs += found
            return self.finish(x, outputs, [])

    return Checkpointed


def trained(model: Decoder, call: Callable[..., Any], inputs: Any) -> tuple[Any, int]:
    """Outputs and gradients of one step, and how many values it saved for the backward."""
    saved = 0

    def save(value: Tensor) -> Tensor:
        nonlocal saved
        saved += value.numel()
        return value

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        outputs = call(**inputs)
    outputs[0].square().mean().backward()
    return [outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}], saved


# layers: of a checkpoint.  Of one, the cut is between two; of two, it is inside.
@pytest.mark.parametrize(
    ("kind", "layers", "lowering"),
    [
        ("not reentrant", 1, "eager"),
        ("reentrant", 1, "eager"),
        ("selective", 2, "aot_eager"),
        *slow(("not reentrant", 2, "aot_eager"), ("reentrant", 2, "aot_eager")),
        *slow(("selective", 1, "eager"), ("not reentrant", 1, "aot_eager")),
        *slow(("reentrant", 2, "eager")),
    ],
)
def test_checkpointed_layers(kind: str, layers: int, lowering: str) -> None:
    sizes = Sizes(layers=4)
    plain, inputs = Decoder(sizes).train(), prompt(sizes)
    model = checkpointed(Decoder, layers, **OPTIONS[kind])(sizes).train()
    model.load_state_dict(plain.state_dict())
    setting = {"retain_tokens": RETAIN, "layer": 1 if layers == 2 else 2, "lowering": lowering}
    found, saved = trained(model, compiled(model, **setting), inputs)
    assert isinstance(dartfx.reports()[-1].outcome, Pruned), dartfx.reports()[-1]
    by_hand = trained(plain, lambda **i: pruned_by_hand(plain, i, RETAIN, setting["layer"]), inputs)
    assert_same(found, by_hand[0])
    torch._dynamo.reset()
    if lowering == "eager":  # AOTAutograd saves no more than it must of so small a model anyway
        assert saved < trained(plain, compiled(plain, **setting), inputs)[1]


@GRAD
def test_checkpoints_behind_a_graph_break() -> None:
    sizes = Sizes(layers=4)
    plain, inputs = Decoder(sizes).train(), prompt(sizes)
    model = checkpointed(Halves, 1, use_reentrant=False)(sizes).train()
    model.load_state_dict(plain.state_dict())
    options = {"lowering": "eager", "retain_tokens": RETAIN, "on_unsupported": "error"}
    call = torch.compile(model, backend="dart", options=options)
    found, saved = trained(model, call, inputs)
    by_hand = trained(plain, lambda **i: pruned_by_hand(plain, i, RETAIN), inputs)
    assert any(report.pruned for report in dartfx.reports())
    assert_same(found, by_hand[0])
    assert saved < by_hand[1]


@GRAD
@pytest.mark.parametrize(
    ("family", "reentrant"),
    [("llava", False), *slow(("llava", True), ("qwen2_5_vl", False), ("qwen2_5_vl", True))],
)
def test_a_training_step_of_a_family(family: str, reentrant: bool) -> None:
    """Loss and gradients of the eager model pruned by hooks."""
    built = load(family, layers=3)
    inputs = built.make_inputs("one")
    ids, model = inputs["input_ids"], built.model.train().requires_grad_(True)
    hooks = hooks_of.Hooks(model, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "layered"), torch.enable_grad():
        logits = model(**inputs, use_cache=True).logits
    labels = ids.masked_fill(ids == built.image_token_id, -100)
    assert hooks.keep_idx is not None
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].gather(1, hooks.keep_idx)

    def step(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = step(logits)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    dartfx.compile(model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error")
    found = step(model(**inputs, use_cache=False).logits)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


# --- nested compile regions -------------------------------------------------------------------


class Region(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = super().forward(x, context)
        return y, k.clone(), v.clone()


@torch.compiler.nested_compile_region
def run_layer(layer: Layer, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    y, k, v = layer(x, context)
    return y, k.clone(), v.clone()


class ByFunction(Decoder):
    """One region, a function that is given each layer in turn."""

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        x, _ = self.merge(ids, features)
        context, outputs = self.context(x, valid), []
        for layer in self.layers:
            x, k, v = run_layer(layer, x, context)
            outputs += [k, v]
        return self.finish(x, outputs, [])


@pytest.mark.parametrize(
    "model", [lambda z: Decoder(z, layer=Region), ByFunction], ids=["method", "function"]
)
def test_nested_compile_regions(model: Callable[[Sizes], Decoder]) -> None:
    sizes = Sizes(layers=4)
    assert_pruned(model(sizes), prompt(sizes))


# --- autocast, cond ---------------------------------------------------------------------------


class Casting(Decoder):
    """Its layers run under autocast, as a model's forward may say."""

    def forward(self, ids: Tensor, features: Tensor, valid: Tensor | None = None) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids, features, valid)


def test_a_whole_model_under_its_own_autocast() -> None:
    model, inputs = Casting(SMALL).eval(), prompt(SMALL)
    with torch.no_grad():
        outputs = compiled(model, retain_tokens=RETAIN, layer=1)(**inputs)
        assert isinstance(dartfx.reports()[-1].outcome, Pruned), dartfx.reports()[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1), **AUTOCAST)


def _branches(layer: Layer, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1.0, lambda x: x - 1.0, (x,))


def test_cond_on_the_tokens_is_refused_by_name() -> None:
    declined = assert_declined(Decoder(SMALL, layer=changed(_branches)), prompt(SMALL), "cond")
    assert "torch.cond" in declined.because
    assert "report" not in declined.advice


class BranchFirst(Decoder):
    """A branch in front of the merge, where no vision token is yet."""

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cond(features.sum() > 0, lambda f: f * 2.0, lambda f: f + 0.5, (features,))
        return super().merge(ids, features)


def test_cond_elsewhere_is_no_obstacle() -> None:
    assert_pruned(BranchFirst(SMALL), prompt(SMALL))
