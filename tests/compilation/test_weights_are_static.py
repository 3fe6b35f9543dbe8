"""Inductor recognises the weights of a pruned graph: its CUDA graphs copy all other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph

import dartfx
from tests.support.families import called
from tests.support.tolerances import RETAIN


class _Seen(Exception):
    """Nothing after what is asked for needs to be compiled."""


def static_inputs(backend: Any, **options: Any) -> tuple[int, int]:
    """How many inputs the graph of a call has, and how many of them Inductor takes for weights."""
    family, found = called("llava"), []

    def note(graph: Graph) -> None:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        # Of the whole graph: this one may be that of a layer in it.
        found.append((len(metadata.input_info), len(metadata.static_input_indices)))
        raise _Seen

    torch.compiler.reset()
    run = torch.compile(family.model, backend=backend, fullgraph=True, **options)
    with (
        torch._inductor.config.patch(post_grad_custom_post_pass=note),
        pytest.raises(BackendCompilerFailed, match="_Seen"),
        torch.no_grad(),
    ):
        run(**family.make_inputs("one"))
    assert len(found) == 1
    return found[0]


def test_those_of_a_pruned_graph_are_those_of_the_unpruned_one() -> None:
    inputs, weights = static_inputs("inductor")
    pruned = static_inputs("dart", options={"retain_tokens": RETAIN})
    pre_pass = dartfx.as_pre_pass({"retain_tokens": RETAIN})
    hosted = static_inputs(lambda module, given: compile_fx(pre_pass(module, given), given))
    assert 0 < weights < inputs
    assert [inputs - weights] * 2 == [every - known for every, known in (pruned, hosted)]
