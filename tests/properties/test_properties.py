"""Random decoders in plain torch: the rewritten graph is the decoder pruned by hand, or declined.

Every example goes through ``torch.compile`` and the backend as a user's model does.  Only dynamo
gives a graph its module paths, which the passes anchor on, so nothing cheaper would be as honest;
what is left out is Inductor (``lowering="eager"``), since the rewritten graph itself is at stake.
Dynamo takes most of the time: about half a second for an example, two with dynamic shapes.

Hypothesis draws seeds, each of which makes one :class:`Plan`: its own mutations would spend five
examples of six on copies of the first.  A failing plan is made as plain as it stays failing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor
from torch.fx import GraphModule

import dartfx
from dartfx.backend.graph_compiler import compile_graph
from dartfx.config.options import DartConfig
from dartfx.errors import SelectionError
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.refusal import Declined
from dartfx.runtime.graph_runs import NotedRun
from dartfx.runtime.kept_positions import ShortCaches
from dartfx.runtime.mask_dispatch import MaskDispatcher
from dartfx.tools.zoo import oracle
from tests.support.plain.decoders import Inputs, assert_same, compiled, pruned_by_hand
from tests.support.plain.random_attention import LayerStyle
from tests.support.plain.random_decoders import PADDED, Plan, RandomDecoder, plans, prompt_of
from tests.support.plain.random_graphs import Text, TextPlan, text_inputs, texts
from tests.support.plain.random_layers import HAZARDS
from tests.support.tolerances import SMALL_DECODER

# Hypothesis collects garbage at its start.
pytestmark = pytest.mark.usefixtures("own_objects")

# Where two scores are closer than this, float32 and float64 may choose differently.
CLOSE = 1e-5
ATTEMPTS = 80


def examples(share: float) -> settings:
    """This share of the examples of the profile in force (see ``tests/conftest.py``)."""
    return settings(max_examples=round(settings.default.max_examples * share))


def select(
    hidden: Tensor, keys: Tensor, vision: Tensor, valid: Tensor | None, per_row: int, retain: int
) -> Tensor:
    """The float64 oracle's selection; an example that rounding decides is thrown away."""
    chosen = oracle.select_batch(hidden, keys, vision, retain, valid)
    assume(chosen.gap > CLOSE)
    return torch.tensor(chosen.keep_idx)


def trims(plan: Plan) -> bool:
    """Whether the caches of the layers before the cut are to be trimmed, too."""
    by_itself = plan.kv_layout == "auto" and (plan.mask != "none" or plan.z.batch > 1)
    return plan.kv_layout == "uniform" or by_itself


def by_hand(plan: Plan, model: RandomDecoder, inputs: Inputs) -> Any:
    """The outputs, or None for a batch that the operator must refuse."""
    unequal = len(set(plan.counts)) > 1
    if unequal and plan.caches and trims(plan):
        return None
    try:
        return pruned_by_hand(
            model,
            inputs,
            plan.retain,
            plan.cut,
            known_valid=plan.mask in PADDED,
            uniform=trims(plan),
            select=select,
        )
    except oracle.TextLost:
        assert unequal
        return None


def fresh(seed: int) -> None:
    torch.compiler.reset()
    dartfx.reset()
    torch.manual_seed(seed)


def outcome_of(plan: Plan) -> Outcome:
    """Compile one decoder, call it, compare; what became of its graph.

    With dynamic shapes it is called again with a longer prompt and more vision tokens.
    """
    fresh(plan.seed)
    model = RandomDecoder(plan).eval()
    call = compiled(
        model,
        dynamic=plan.dynamic,
        retain_tokens=plan.retain,
        layer=plan.cut,
        kv_layout=plan.kv_layout,
    )
    with torch.no_grad():
        outcome = compare(plan, model, call, prompt_of(plan))
        assert len(dartfx.reports()) == 1, dartfx.reports()
        if isinstance(outcome, Pruned):
            tokens = sum(plan.counts) // plan.z.batch
            assert (outcome.vision_tokens, outcome.retained) == (tokens, plan.retain)
            assert outcome.sequence == (plan.z.seq, plan.z.seq - tokens + plan.retain)
        if plan.dynamic:
            compare(plan, model, call, prompt_of(plan, longer=5))
    return outcome


def compare(plan: Plan, model: RandomDecoder, call: Callable[..., Any], inputs: Inputs) -> Outcome:
    """One call: pruned as by hand, refused by the operator where that is right, or declined.

    Only a pruned graph is pruned by hand too: a layer that reads positions, which must be declined,
    need not run at the shorter length at all.
    """
    try:
        outputs = call(**inputs)
    except SelectionError:
        if by_hand(plan, model, inputs) is not None:
            raise
        return dartfx.reports()[-1].outcome
    outcome = dartfx.reports()[-1].outcome
    if isinstance(outcome, Pruned):
        expected = by_hand(plan, model, inputs)
        assert expected is not None, "a batch that should have been refused"
        assert_same(outputs, expected, **SMALL_DECODER)
    else:
        assert isinstance(outcome, Declined), outcome
        assert outcome.because
        assert not outcome.because.startswith("internal error"), outcome
        assert_same(outputs, model(**inputs), rtol=0, atol=0)
    return outcome


# --- making a failing plan plain ------------------------------------------------------------


def plainer(plan: Plan) -> Iterator[Plan]:
    """The plan with one place less: a spelling back at its default, a layer or a pad left out."""
    for index in range(len(plan.layers) - 1, -1, -1):
        if len(plan.layers) > 2 and plan.cut < len(plan.layers) - 1:
            yield replace(plan, layers=(*plan.layers[:index], *plan.layers[index + 1 :]))
    if plan.pads:
        yield replace(plan, pads=())
    for name in ("dynamic", "finish", "hidden", "norm", "merge", "kv_layout", "rope", "positions"):
        default = getattr(Plan, name)
        if getattr(plan, name) != default:
            yield replace(plan, **{name: default})
    for index, layer in enumerate(plan.layers):
        for field in fields(LayerStyle):
            if getattr(layer, field.name) != field.default:
                simple = replace(layer, **{field.name: field.default})
                yield replace(
                    plan, layers=(*plan.layers[:index], simple, *plan.layers[index + 1 :])
                )


def explained(plan: Plan, check: Callable[[Plan], object]) -> None:
    """Run ``check``; when it fails, fail with the plainest plan that still fails in that way."""
    try:
        check(plan)
        return
    except UnsatisfiedAssumption:
        raise
    except Exception as error:
        kind, first, attempts = type(error), error, 0
    again = True
    while again:
        again = False
        for simple in plainer(plan):
            attempts += 1
            if attempts > ATTEMPTS:
                break
            try:
                check(simple)
            except kind as error:
                plan, first, again = simple, error, True
                break
            except Exception:
                continue
    raise AssertionError(f"{first}\nThe plainest example found:\n{plan}") from first


# --- the properties -------------------------------------------------------------------------


def test_pruned_like_by_hand_or_declined() -> None:
    outcomes: Counter[type[Outcome]] = Counter()

    @examples(1)
    @given(plans)
    def check(plan: Plan) -> None:
        explained(plan, lambda p: outcomes.update([type(outcome_of(p))]))

    check()
    assert outcomes.total() >= 0.85 * settings.default.max_examples
    assert outcomes[Pruned] >= 0.6 * outcomes.total(), outcomes


def test_layer_that_reads_positions() -> None:
    """Before the cut it sees the whole prompt as it always did; after it, it must be declined."""
    before: Counter[type[Outcome]] = Counter()

    @examples(0.3)
    @given(plans)
    def check(plan: Plan) -> None:
        explained(with_hazard(plan), one)

    def one(plan: Plan) -> None:
        outcome = outcome_of(plan)
        if all(layer.hazard == "none" for layer in plan.layers[plan.cut :]):
            before[type(outcome)] += 1
        else:
            assert isinstance(outcome, Declined), "pruned before a layer that reads positions"

    check()
    assert before[Pruned] >= 0.5 * before.total() > 0.03 * settings.default.max_examples, before


def with_hazard(plan: Plan) -> Plan:
    """The plan with an operation that reads positions in one of its layers."""
    rng = Random(plan.seed)
    index = rng.randrange(len(plan.layers))
    hazard = rng.choice([h for h in HAZARDS if h != "windows" or plan.z.seq % 2 == 0])
    layers = list(plan.layers)
    layers[index] = replace(layers[index], hazard=hazard)
    return replace(plan, layers=tuple(layers))


def test_graph_without_vision_tokens() -> None:
    """Lowered as dynamo gave it, node for node; results and writes to inputs as in eager."""
    seen: Counter[bool] = Counter()

    @examples(0.7)
    @given(texts)
    def check(plan: TextPlan) -> None:
        fresh(plan.seed)
        model, inputs, others = Text(plan).eval(), text_inputs(plan), text_inputs(plan)
        with torch.no_grad():
            outputs = torch.compile(model, backend=unchanged, dynamic=plan.dynamic)(*inputs)
            assert_same(outputs, model(*others), rtol=0, atol=0)
        assert_same(inputs, others, rtol=0, atol=0)
        assert not any(report.pruned for report in dartfx.reports())
        seen[plan.z.layers > 0] += 1

    check()
    assert min(seen[False], seen[True]) >= 0.13 * settings.default.max_examples


def unchanged(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The dart backend, which must lower this very graph without having touched it."""
    config = DartConfig(retain_tokens=1, layer=1, lowering="eager", on_unsupported="error")
    nodes, code = list(module.graph.nodes), module.code
    compiled = compile_graph(config, module, inputs)
    assert list(module.graph.nodes) == nodes
    assert module.print_readable(print_output=False)
    assert module.code == code
    assert isinstance(compiled, ShortCaches)
    inner = compiled._compiled
    assert isinstance(inner, NotedRun | MaskDispatcher)
    runs = inner._compiled if isinstance(inner, NotedRun) else inner._unpruned
    assert runs == module.forward
    return compiled
