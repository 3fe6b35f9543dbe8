"""Compiled functions that call a model and use its outputs, such as for a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS = {"retain_tokens": RETAIN, "lowering": "eager"}


@pytest.fixture(scope="module")
def family() -> Family:
    return load("llava", layers=3)


def of_prompt(model: Any) -> Callable[..., Tensor]:
    """A loss over the labels of the whole prompt."""

    def loss(input_ids: Tensor, **inputs: Any) -> Tensor:
        logits = model(input_ids=input_ids, **inputs).logits
        return cross_entropy(logits[0, :-1], input_ids[0, 1:])

    return loss


def of_kept_tokens(model: Any) -> Callable[..., Tensor]:
    """A loss over the labels of the tokens that are left."""

    def loss(input_ids: Tensor, **inputs: Any) -> Tensor:
        output = model(input_ids=input_ids, **inputs)
        kept = dartfx.kept_positions(output)
        labels = input_ids.gather(1, kept)
        return cross_entropy(output.logits[0, :-1], labels[0, 1:])

    return loss


def expected(family: Family) -> Tensor:
    inputs = family.make_inputs()
    oracle = hooked.pruned_forward(family.model, inputs, retain=RETAIN)
    labels = inputs["input_ids"].gather(1, oracle.keep_idx)
    return cross_entropy(oracle.logits[0, :-1], labels[0, 1:])


@pytest.mark.parametrize("compiled_model", [True, *slow(False)])
def test_a_loss_of_the_whole_prompt_fails_with_the_reason(
    family: Family, compiled_model: bool
) -> None:
    model = copy.deepcopy(family.model)
    outer: dict[str, Any] = {"backend": "dart", "options": OPTIONS}
    if compiled_model:
        dartfx.compile(model, **OPTIONS)
        outer = {"backend": "eager"}
    function = torch.compile(of_prompt(model), **outer)
    with torch.no_grad(), pytest.raises(RuntimeError, match="batch_size") as failed:
        function(**family.make_inputs())
    (note,) = failed.value.__notes__
    assert note.startswith("dartfx kept 19 of the prompt's 29 tokens")
    assert "dartfx.kept_positions" in note


def test_other_failures_say_nothing_of_the_cut(family: Family) -> None:
    def function(**inputs: Any) -> Tensor:
        return torch.ones(3) @ family.model(**inputs).logits.flatten()[:4]

    function = torch.compile(function, backend="dart", options=OPTIONS)
    with torch.no_grad(), pytest.raises(RuntimeError) as failed:
        function(**family.make_inputs())
    assert not getattr(failed.value, "__notes__", [])


def test_a_loss_of_the_kept_tokens(family: Family) -> None:
    inputs, model = family.make_inputs(), copy.deepcopy(family.model)
    bare = torch.compile(of_kept_tokens(model), backend="dart", options=OPTIONS | {"tokens": True})
    with torch.no_grad():
        torch.testing.assert_close(bare(**inputs), expected(family), **CLOSE)
        torch.compiler.reset()
        dartfx.compile(model, **OPTIONS)
        around = torch.compile(of_kept_tokens(model), backend="eager")
        torch.testing.assert_close(around(**inputs), expected(family), **CLOSE)


def test_one_graph_that_holds_the_loss_names_its_line(family: Family) -> None:
    options = OPTIONS | {"on_unsupported": "error"}
    function = torch.compile(
        of_prompt(family.model), backend="dart", fullgraph=True, options=options
    )
    with pytest.raises(Exception, match=r"slice[\s\S]*cross_entropy\(logits\[0, :-1\]"):
        function(**family.make_inputs())


def test_one_graph_around_a_compiled_model(family: Family) -> None:
    """dynamo must not trace the model's own forward in its place, which would be unpruned."""
    model = dartfx.compile(copy.deepcopy(family.model), **OPTIONS)

    def function(**inputs: Any) -> Tensor:
        return model(**inputs).logits

    function = torch.compile(function, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        function(**family.make_inputs())
