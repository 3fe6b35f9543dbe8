"""Per-call budgets: outputs, and the number of compilations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import dartfx
from dartfx.backend.graph_compiler import GraphCompiler
from dartfx.backend.lowering import lower, lowering_with
from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError, SelectionError
from dartfx.passes.outcome import Pruned
from dartfx.runtime.call_budget import CallBudget
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.registry import load
from tests.support.families import tower_outside
from tests.support.slow import slow
from tests.support.tolerances import CLOSE


@contextmanager
def counting() -> Iterator[list[int]]:
    """How often a graph that selects tokens is lowered."""
    made: list[int] = []

    def counted(config: DartConfig, module: GraphModule, inputs: Sequence[Any]) -> Any:
        if any("select_tokens" in str(node.target) for node in module.graph.nodes):
            made.append(len(module.graph.nodes))
        return lower(config, module, inputs)

    with lowering_with(counted):
        yield made


def assert_same(output: Any, reference: hooked.Pruned) -> None:
    torch.testing.assert_close(output.logits, reference.logits, **CLOSE)
    assert [e.keys.shape[2] for e in output.past_key_values.layers] == reference.kv_lengths


@pytest.mark.parametrize(("name", "variant"), [("llava", "pad2"), *slow(("qwen2_5_vl", "pad2"))])
def test_three_budgets_take_two_compilations(name: str, variant: str) -> None:
    """The second is for all but the one that the model was compiled with."""
    family = load(name, layers=3)
    inputs = family.make_inputs(variant)
    oracle = {
        retain: hooked.pruned_forward(family.model, inputs, retain=retain, kv_layout="uniform")
        for retain in (3, 6, 9)
    }
    unpruned = tower_outside(family.model)(**inputs).logits
    model = dartfx.compile(
        family.model, retain_tokens=3, lowering="eager", kv_layout="uniform", on_unsupported="error"
    )
    with counting() as made:
        assert_same(model(**inputs), oracle[3])
        for retain in (6, 9):
            with dartfx.budget(model, retain):
                assert_same(model(**inputs), oracle[retain])
        assert_same(model(**inputs), oracle[3])
        with dartfx.budget(model, 99):  # more than there are: nothing is dropped
            whole = model(**inputs)
        torch.testing.assert_close(whole.logits, unpruned, **CLOSE)
    assert len(made) <= 2
    pruned = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert [p.retained for p in pruned] == [3, 6]


def test_a_ratio_and_a_generation() -> None:
    """Prefill and decode of ``generate``, with a share of the vision tokens dropped."""
    family = load("llava", layers=3)
    inputs = family.make_inputs("pad2")
    oracle = hooked.pruned_generate(
        family.model, inputs, retain=4, kv_layout="uniform", max_new_tokens=2
    )
    model = dartfx.compile(family.model, retain_tokens=16, lowering="eager", selector="dart")
    with dartfx.budget(model, reduction_ratio=0.75):  # of 16
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=2)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], oracle.token_ids)
    (pruned,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert pruned.retained == 4


@pytest.mark.parametrize(
    ("options", "budget", "said"),
    [
        ({}, {}, "takes retain_tokens or reduction_ratio, got None and None"),
        ({}, {"retain_tokens": 4, "reduction_ratio": 0.5}, "got 4 and 0.5"),
        ({}, {"retain_tokens": -1}, "retain_tokens must be an int, at least 0, or None, got -1"),
        ({}, {"reduction_ratio": 1.5}, "reduction_ratio must be a number with 0 <="),
        ({}, {"reduction_ratio": 1 / 3}, "must be one number of at most four decimals"),
        ({"quota": [4, 3]}, {"retain_tokens": 4}, r"compiled with quota=\(4, 3\)"),
        ({"layer": [1, 2], "retain_tokens": [4, 3]}, {"retain_tokens": 2}, "layer="),
    ],
)
def test_budgets_that_are_refused(
    options: dict[str, Any], budget: dict[str, Any], said: str
) -> None:
    model = dartfx.compile(load("llava").model, **options)
    with pytest.raises(ConfigError, match=said), dartfx.budget(model, **budget):
        pass


def test_a_model_that_is_not_compiled_in_place() -> None:
    model = load("llava").model
    place = pytest.raises(ConfigError, match=r"dartfx\.compile compiled in place")
    with place, dartfx.budget(model, 4):
        pass


@pytest.mark.slow
def test_sliding_windows_take_no_budget_of_a_call() -> None:
    family = load("gemma3")
    inputs = family.make_inputs()
    model = dartfx.compile(family.model, retain_tokens=4, lowering="eager")
    with (
        dartfx.budget(model, 6),
        pytest.raises(SelectionError, match=r"dartfx\.budget cannot change .*sliding-window"),
    ):
        model(**inputs)
    model(**inputs)


def test_ranks_that_share_a_graph_take_no_budget_of_a_call() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Identity())
    compiler = GraphCompiler(DartConfig(), module, CallerCapabilities(knows_positions=True))
    compiler.across_ranks = True
    with pytest.raises(SelectionError, match="several ranks share it; give retain_tokens"):
        compiler.request_for(CallBudget("tokens", 4))
