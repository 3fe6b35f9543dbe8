"""Merging dropped vision tokens into kept ones, against an eager model whose hooks do the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dartfx
from dartfx.errors import ConfigError
from dartfx.ops.nearest_kept import nearest
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.merging import merged
from dartfx.tools.zoo.registry import load
from tests.support.families import PROMPTS, fresh
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS: dict[str, Any] = {
    "retain_tokens": RETAIN,
    "merge": "nearest",
    "lowering": "eager",
    "on_unsupported": "error",
}


@pytest.mark.parametrize(("name", "variant"), PROMPTS)
def test_generate(name: str, variant: str) -> None:
    family = fresh(name)
    inputs = family.make_inputs(variant)
    where: dict[str, Any] = {"retain": RETAIN, "max_new_tokens": 2, "kv_layout": "uniform"}
    plain = hooked.pruned_generate(family.model, inputs, **where)
    reference = hooked.pruned_generate(family.model, inputs, merge=True, **where)
    dartfx.compile(family.model, **OPTIONS)
    output = family.model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(output.logits, 1)
    assert torch.equal(output.sequences[:, inputs["input_ids"].shape[1] :], reference.token_ids)
    torch.testing.assert_close(logits, reference.logits, **CLOSE)
    assert not torch.allclose(logits[:, 0], plain.logits[:, 0], **CLOSE)
    assert any(isinstance(r.outcome, Pruned) for r in dartfx.reports())


@pytest.mark.parametrize("lowering", ["eager", *slow("inductor")])
def test_a_forward_of_symbolic_sizes(lowering: str) -> None:
    family = load("llava", layers=3)
    inputs = family.make_inputs("one")
    reference = hooked.pruned_forward(family.model, inputs, retain=RETAIN, merge=True)
    options = OPTIONS | {"lowering": lowering}
    fast = torch.compile(
        family.model, backend="dart", fullgraph=True, dynamic=True, options=options
    )
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, reference.logits, **CLOSE)


def test_gradients_flow_through_the_means() -> None:
    family = load("llava", layers=3)
    inputs, model = family.make_inputs("one"), family.model
    weight = model.model.multi_modal_projector.linear_2.weight.requires_grad_()
    grads = []
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks at the first call, which dynamo cannot trace
    for merge in ("none", "nearest"):
        torch._dynamo.reset()
        options = OPTIONS | {"merge": merge}
        fast = torch.compile(model, backend="dart", fullgraph=True, options=options)
        grads += torch.autograd.grad(fast(**inputs).logits.sum(), weight)
    assert bool(grads[1].isfinite().all())
    assert not torch.allclose(*grads)


def test_every_dropped_vision_token_goes_to_the_most_similar_kept_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 6, generator=generator)
    vision = torch.zeros(2, 9, dtype=torch.bool)
    vision[:, 2:8] = True
    keep = torch.tensor([[0, 1, 3, 6, 8], [0, 1, 2, 7, 8]])
    index = nearest(hidden, keep, vision)
    for row in range(2):
        for token, slot in enumerate(index[row].tolist()):
            if token in keep[row]:
                assert keep[row, slot] == token
            else:
                alike = torch.cosine_similarity(hidden[row, token], hidden[row, keep[row]], -1)
                alike[~vision[row, keep[row]]] = -2
                assert slot == int(alike.argmax())
    # Of a row that keeps none of them, none goes anywhere.
    only_text = torch.tensor([[0, 1, 8], [0, 1, 8]])
    assert nearest(hidden, only_text, vision)[:, 2:8].eq(-1).all()
    alone = merged(hidden, hidden, only_text, vision)
    assert torch.equal(alone, hidden)


def test_merging_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match=r"merge='nearest' merges at one layer.*\[2, 4\]"):
        dartfx.DartConfig(layer=(2, 4), retain_tokens=(9, 6), merge="nearest")
    with pytest.raises(ConfigError, match=r"merge cannot be 'mean'.*valid: nearest, none"):
        dartfx.DartConfig(merge="mean")
    family = load("llava", layers=3)
    with pytest.raises(ConfigError, match=r"merge='nearest': dartfx.verify compares"):
        dartfx.verify(family.model, **family.make_inputs("one"), options=OPTIONS)
