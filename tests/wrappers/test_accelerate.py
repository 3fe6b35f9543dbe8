"""Models with accelerate's hooks: on several devices, or with offloaded weights."""

from __future__ import annotations

import warnings

import pytest
import torch

import dartfx
from dartfx.passes.refusal import Declined
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN

accelerate = pytest.importorskip("accelerate")


def _offload(model: torch.nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _dispatch(model: torch.nn.Module) -> None:
    """Hooks on every layer as a whole, as for a model on two devices."""
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(3)}
    others = ["vision_tower", "multi_modal_projector", "language_model.embed_tokens",
              "language_model.norm", "language_model.rotary_emb"]  # fmt: skip
    places = {f"model.{name}": "cpu" for name in others} | {"lm_head": "cpu"} | layers
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("put_hooks", [_offload, _dispatch])
@pytest.mark.parametrize("first", [True, False], ids=["hooks first", "hooks later"])
def test_hooks_on_layers_are_refused_by_name(put_hooks, first: bool) -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    plain = built.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    if first:
        put_hooks(built.model)
    dartfx.compile(built.model, retain_tokens=RETAIN, lowering="eager", on_unsupported="warn")
    if not first:
        put_hooks(built.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = built.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    messages = [str(w.message) for w in caught if w.category is dartfx.PruningWarning]
    assert len(messages) == 1
    assert "hooks of accelerate (AlignDevicesHook" in messages[0]
    assert "internal error" not in messages[0]
    (report,) = dartfx.reports()
    assert isinstance(report.outcome, Declined)
    assert torch.equal(tokens, plain)


def test_hooks_on_the_model_alone_are_no_obstacle() -> None:
    built = load("llava", layers=3)
    accelerate.cpu_offload_with_hook(built.model, torch.device("cpu"))
    dartfx.compile(built.model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error")
    built.model.generate(**built.make_inputs("one"), max_new_tokens=2, do_sample=False)
    assert any(report.pruned for report in dartfx.reports())


def test_text_runs_without_a_word_and_error_raises() -> None:
    built = load("llava", layers=3)
    _offload(built.model)
    dartfx.compile(built.model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error")
    with torch.no_grad():
        built.model(**built.make_inputs("text"))
        with pytest.raises(dartfx.UnsupportedGraphError, match="hooks of accelerate"):
            built.model(**built.make_inputs("one"))
