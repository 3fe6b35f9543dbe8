"""Hooks that collect outputs, with and without dynamo tracing a part of the model."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dartfx.model.capturing import Collector


def test_a_hook_breaks_no_graph_and_sees_what_is_collected_outside() -> None:
    collector, graphs = Collector(), 0

    def layer(x: Tensor) -> Tensor:
        found = collector.get()
        if found is not None and "seen" in found:
            found["seen"].append(x)
        return x + 1

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(layer, backend=backend)
    for collected, seen in (({}, 0), ({"seen": []}, 1), (None, 0)):
        token = collector.set(collected)
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
        collector.reset(token)
        assert len((collected or {}).get("seen", [])) == seen
    assert graphs == 3
    assert collector.get() is None


def test_inside_a_trace_it_is_set_and_reset() -> None:
    collector = Collector()

    def outer(x: Tensor) -> Tensor:
        token = collector.set({"seen": []})
        collector.get()["seen"].append(x * 2)
        result = collector.get()["seen"][0]
        collector.reset(token)
        return result

    assert torch.equal(torch.compile(outer, backend="eager", fullgraph=True)(torch.ones(1)),
                       torch.full((1,), 2.0))  # fmt: skip
    assert collector.get() is None


def test_threads_collect_apart() -> None:
    collector, others = Collector(), []
    token = collector.set({"here": []})
    thread = threading.Thread(target=lambda: others.append(collector.get()))
    thread.start()
    thread.join()
    inner = collector.set({})
    collector.reset(inner)
    assert (others, collector.get()) == ([None], {"here": []})
    collector.reset(token)
