"""A faulty pass is caught by the check after it: the model runs unpruned and reports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

import dartfx
from dartfx.passes import pipeline
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.graph import aten, fake_mode, sizes
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from dartfx.passes.rules import RULES
from dartfx.passes.transform import check_shapes, shrink_sizes
from dartfx.passes.transform.gather_frontier import Gatherer
from tests.support.plain.decoders import (
    Decoder,
    Sizes,
    Style,
    assert_same,
    prompt,
    pruned_by_hand,
    run,
)

Patch = pytest.MonkeyPatch
STYLE = Style(rope="one_row", split="view", join="view")


def no_shrink(patch: Patch) -> None:
    patch.setattr(shrink_sizes, "shrink", lambda *_: None)


def no_rope_gather(patch: Patch) -> None:
    _skip_gather(patch, lambda value: sizes(value)[-1] == Sizes.head_dim)


def no_hidden_gather(patch: Patch) -> None:
    _skip_gather(patch, lambda value: sizes(value)[-1] == Sizes.hidden)


def _skip_gather(patch: Patch, skipped: Callable[[Node], bool]) -> None:
    gather = Gatherer.__call__

    def call(self: Gatherer, value: Node, anchor: Node) -> Node:
        return value if self.axes.dims(value) and skipped(value) else gather(self, value, anchor)

    patch.setattr(Gatherer, "__call__", call)


def without(packet: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.delitem(RULES, packet)


def failing_pass(patch: Patch) -> None:
    def gather(*_: object) -> None:
        raise KeyError("lost")

    patch.setattr(pipeline, "gather_frontier", gather)


def silent_pass(patch: Patch) -> None:
    def gather(region: CutRegion, _: object) -> None:
        for node in region.nodes:
            if node.op == "call_function":
                raise AssertionError  # pytest would give ``assert`` a text

    patch.setattr(pipeline, "gather_frontier", gather)


BROKEN: dict[str, tuple[Callable[[Patch], None], str]] = {
    "shrink does nothing": (no_shrink, "after pruning"),
    "rope is not gathered": (no_rope_gather, "after pruning"),
    "hidden states are not gathered": (no_hidden_gather, "after pruning"),
    "no rule for linear": (without(aten.linear), "token axis"),
    "no rule for attention": (without(aten.scaled_dot_product_attention), "token axis"),
    "no rule for transpose": (without(aten.transpose), "token axis"),
    "a pass raises": (failing_pass, "internal error in pass 'gather': KeyError: 'lost'"),
    "a pass asserts": (silent_pass, "AssertionError: raise AssertionError"),
}


@pytest.mark.parametrize(("misbehave", "text"), BROKEN.values(), ids=BROKEN)
def test_misbehaving_pass_changes_nothing(
    misbehave: Callable[[Patch], None], text: str, monkeypatch: Patch
) -> None:
    misbehave(monkeypatch)
    model, inputs = Decoder(style=STYLE).eval(), prompt(Sizes())
    with pytest.warns(dartfx.PruningWarning, match="left a graph unpruned"):
        outputs, outcome = run(model, inputs, retain_tokens=5, on_unsupported="warn")
    assert isinstance(outcome, Declined), outcome
    assert text in outcome.because
    if text.startswith("Assertion"):
        assert "(at node " in outcome.because
        assert "decoders.py" in outcome.because
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)


def test_check_is_what_catches_it(monkeypatch: Patch) -> None:
    """Without the misbehaviour the same decoder is pruned, and every pruned value was compared."""
    compared: list[Node] = []
    compare = check_shapes._compare

    def note(node: Node, shape: list[Any]) -> None:
        compared.append(node)
        compare(node, shape)

    monkeypatch.setattr(check_shapes, "_compare", note)
    model, inputs = Decoder(style=STYLE).eval(), prompt(Sizes())
    outputs, outcome = run(model, inputs, retain_tokens=5, on_unsupported="error")
    assert isinstance(outcome, Pruned)
    assert {n.target for n in compared} >= {aten.linear.default, aten.view.default}
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, 5))


def test_calls_that_are_alike_are_computed_once(monkeypatch: Patch) -> None:
    """More layers need no more calls, and every value is what computing all calls gives."""
    evaluate, recompute = check_shapes.evaluate, check_shapes._recompute
    made: list[Node] = []

    def counted(node: Node, mode: Any) -> Any:
        made.append(node)
        return evaluate(node, mode)

    def compared(graph: Graph, nodes: Any, shapes: Any) -> None:
        recompute(graph, nodes, shapes)
        for node in nodes:
            if isinstance(known := node.meta.get("val"), torch.Tensor):
                again = evaluate(node, fake_mode(graph))
                assert (again.shape, again.stride()) == (known.shape, known.stride())
                assert (again.dtype, again.device) == (known.dtype, known.device)

    monkeypatch.setattr(check_shapes, "evaluate", counted)
    monkeypatch.setattr(check_shapes, "_recompute", compared)
    counts = []
    for layers in (4, 6):
        made.clear()
        _, outcome = run(Decoder(z := Sizes(layers=layers), STYLE), prompt(z), retain_tokens=5)
        assert isinstance(outcome, Pruned)
        counts.append(len(made))
    assert counts[0] == counts[1] > 0
