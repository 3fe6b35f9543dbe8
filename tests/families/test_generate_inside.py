"""``generate`` of a model that calls the ``generate`` of a model inside it."""

from __future__ import annotations

import pytest

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo.registry import load

pytest.importorskip("transformers")


def test_beams_and_a_budget_of_a_model_that_calls_another() -> None:
    """Its tokens are what tests/tools/test_families.py compares with the hooks'."""
    family = load("blip_2", layers=3)
    model, inputs = family.model, family.make_inputs("one")
    dartfx.compile(model, retain_tokens=6, lowering="eager", on_unsupported="error")
    with dartfx.budget(model, 4):
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    pruned = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert [(p.how, p.batch, p.retained) for p in pruned] == [
        ("embeddings that are not of token ids", 2, 4)
    ]
    assert "generate" not in vars(model.language_model)
    assert model.language_model._compiled_call_impl is None


def test_where_several_may_write_none_is_compiled() -> None:
    from dartfx.model.attached import _generating_inside

    blip_2, llava = load("blip_2", layers=2).model, load("llava", layers=2).model
    assert _generating_inside(blip_2) is blip_2.language_model
    assert _generating_inside(llava) is None  # whose generate calls itself
    blip_2.second = llava
    assert _generating_inside(blip_2) is None
