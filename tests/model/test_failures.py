"""Failures that the cut did not cause reach the caller; copies of a model are independent."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import dartfx
from dartfx.backend.later_failures import cut_that_caused
from dartfx.observe.report import Report
from dartfx.passes.outcome import Cut, Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@pytest.fixture
def raised_once() -> Iterator[list[Exception]]:
    pending: list[Exception] = []
    yield pending
    assert not pending


@pytest.mark.parametrize("loud", ["error", *slow("warn")])
def test_no_memory_once_is_raised_and_the_next_call_is_pruned(
    loud: str, raised_once: list[Exception]
) -> None:
    built = load("llava_next", layers=3)  # its forward breaks into several graphs
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": loud}
    model = dartfx.compile(built.model, **options)
    raised_once.append(torch.OutOfMemoryError("CUDA out of memory."))

    @torch.compiler.disable
    def fail(*_: object) -> None:
        if raised_once:
            raise raised_once.pop()

    model.lm_head.register_forward_hook(fail)
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError):
            model(**inputs, use_cache=False)
        logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)


CUT = Pruned("layers", "merge", 2, (Cut(2, 16, 6, (29, 19), ()),), "layered", (2, 1), (2, 1))


@pytest.mark.parametrize(
    ("error", "caused"),
    [
        (ValueError("Expected input batch_size (38) to match target batch_size (58)."), True),
        (RuntimeError("The size of tensor a (19) must match the size of tensor b (29)"), True),
        (IndexError("index 25 is out of bounds for dimension 1 with size 19"), True),
        (torch.OutOfMemoryError("Tried to allocate 19 MiB"), False),
        (KeyError("19"), False),
        (RuntimeError("a bug in a user's hook"), False),
    ],
    ids=lambda value: getattr(value, "__class__", type(value)).__name__,
)
def test_only_errors_about_the_shorter_sequence_are_the_cuts(
    error: Exception, caused: bool
) -> None:
    assert (cut_that_caused(error, [Report(0, 1, CUT)]) is CUT) is caused


def test_nothing_is_the_cuts_where_nothing_was_pruned() -> None:
    assert cut_that_caused(RuntimeError("19"), []) is None


def test_a_copy_generates_with_its_own_weights() -> None:
    built = load("janus", layers=3)  # its class has a generate of its own
    inputs = built.make_inputs("text")
    plain = copy.deepcopy(built.model)
    model = dartfx.compile(built.model, retain_tokens=RETAIN, lowering="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for other in (twin, plain):
            other.lm_head.weight.zero_()
            other.lm_head.weight[7].fill_(1.0)
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(**inputs, **how)
    assert twin.generate(**inputs, **how).tolist() == expected.tolist()


def test_a_refusal_says_why_the_call_is_not_one_graph() -> None:
    built = load("llava", layers=3)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}
    inputs = built.make_inputs()
    with torch.no_grad():
        built.model(**inputs)  # transformers sets up hooks, which would break the graph, too
    model = dartfx.compile(built.model, **options)
    layer = model.get_decoder().layers[1]
    layer.register_forward_hook(lambda *_: torch._dynamo.graph_break(msg="the user's own"))
    with pytest.raises(dartfx.UnsupportedGraphError, match="not one graph") as refused:
        model(**inputs)
    assert refused.value.because.endswith("the user's own")
    assert "test_failures.py" in refused.value.where
    assert refused.value.advice.startswith("what breaks the graph taken out; or model.generate")
    torch.compiler.reset()
    # Models of dartfx.compile get no advice to call it.
    bare = torch.compile(dartfx.uncompile(model), backend="dart", options=options)
    with pytest.raises(
        Exception, match=r"try: fullgraph=True, dartfx\.compile, or model\.generate"
    ):
        bare(**inputs)
