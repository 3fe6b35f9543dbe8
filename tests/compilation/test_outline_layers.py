"""Which layers become calls of one subgraph, and that the calls are equivalent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout

from dartfx.passes.layers import equal_runs
from dartfx.passes.refusal import Refusal
from dartfx.passes.transform.outline_layers import Outlined, outline_layers

Block = Callable[[Tensor, Tensor, int], Any]
X, WEIGHTS = torch.randn(2, 5, 8), [torch.randn(8, 8) / 8 for _ in range(4)]


def body(x: Tensor, weight: Tensor, number: int) -> Tensor:
    y = (x @ weight).sin()
    for _ in range(6):
        y = (y + x).tanh()
    return x + y


def stack(block: Block) -> GraphModule:
    """Four layers, each by the function and a weight of its own; every layer's last result."""

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        found = []
        for number, weight in enumerate(weights):
            x, *others = pair if isinstance(pair := block(x, weight, number), tuple) else (pair,)
            found += others
        return [x, *found]

    return make_fx(run, tracing_mode="fake", pre_dispatch=True)(X, *WEIGHTS)


def outlined(block: Block) -> Outlined | None:
    """The outlined graph, which computes the same values in memory of their own."""
    module = stack(block)
    calls = len(module.graph.nodes)
    found = outline_layers(module)
    assert len(module.graph.nodes) == calls, "it works on a copy"
    if found is not None:
        torch.manual_seed(0)
        wanted = module(X, *WEIGHTS)
        torch.manual_seed(0)
        given = found.module(X, *WEIGHTS)
        assert all(map(torch.equal, given, wanted))
        starts = [t.untyped_storage().data_ptr() for t in (*given, X, *WEIGHTS)]
        assert len(set(starts)) == len(starts)
    return found


def layers(block: Block) -> list[int]:
    """How many calls each subgraph serves."""
    found = outlined(block)
    return [] if found is None else [calls for calls, _ in found.layers]


def test_equal_layers_are_calls_of_one_subgraph() -> None:
    found = outlined(body)
    assert found is not None
    assert [calls for calls, _ in found.layers] == [4]
    assert found.copied == []
    (inner,) = found.module.children()
    assert not list(inner.parameters()), "parameters are operands"


@pytest.mark.parametrize(
    ("of", "counts"),
    [
        (lambda n: 2.0 if n < 2 else 3.0, [2, 2]),
        (lambda n: 2 if n < 2 else 2.0, [2, 2]),  # equal in Python, not in a graph
        (lambda n: float(n), []),
        (lambda n: 2.0 if n != 3 else 3.0, [3]),
    ],
)
def test_a_constant_makes_the_difference(of: Callable[[int], float], counts: list[int]) -> None:
    assert layers(lambda x, w, n: body(x, w, n) * of(n)) == counts


def test_reading_another_operand_makes_the_difference() -> None:
    def block(x: Tensor, weight: Tensor, number: int) -> Tensor:
        y = body(x, weight, number)
        return y - (x if number == 2 else y) * 2

    assert layers(block) == [2]


@pytest.mark.parametrize(("last", "first"), [(torch.cos, "matmul"), (torch.exp, "cos")])
def test_layers_end_where_no_kernel_is_split(last: Callable[[Tensor], Tensor], first: str) -> None:
    """Each begins with its product if what reads the last sum is like what begins a layer."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            y = x.cos() @ weight
            for _ in range(6):
                y = (y + y).tanh()
            x = x + y
        return last(x)

    found = outline_layers(make_fx(run, tracing_mode="fake", pre_dispatch=True)(X, *WEIGHTS))
    assert found is not None
    assert [calls for calls, _ in found.layers] == [4]
    body: Any = found.module.layers_0
    called = next(n for n in body.graph.nodes if n.op == "call_function")
    assert called.target.overloadpacket.__name__ == first


def test_layers_on_several_devices_stay() -> None:
    def block(x: Tensor, weight: Tensor, number: int) -> Tensor:
        return body(x, weight, number) + x.to("meta").to("cpu")

    assert layers(lambda x, w, n: body(x, w, n) + x.to("cpu", copy=True)) == [4]
    assert outline_layers(stack(block)) is None


def test_random_layers_stay() -> None:
    def block(train: bool) -> Block:
        return lambda x, w, n: dropout(body(x, w, n), 0.5, train)

    assert layers(block(False)) == [4]
    assert layers(block(True)) == []


def test_layers_that_write_to_what_they_are_given_stay() -> None:
    inside = layers(lambda x, w, n: (x @ w).add_(1).mul_(2) + body(x, w, n))
    given = layers(lambda x, w, n: body(x, w, n) + w.add_(1).sum())
    assert (inside, given) == ([4], [])


@pytest.mark.parametrize(
    ("more", "copies"),
    [
        (lambda x, y: x.transpose(0, 1), 1),  # of what the layer takes
        (lambda x, y: y.transpose(0, 1), 1),  # of what it returns
        (lambda x, y: (y * 2)[:, 1:], 1),  # a part of its own memory
        (lambda x, y: (y * 2).transpose(0, 1), 0),  # all of it
    ],
)
def test_results_share_no_memory(more: Callable[[Tensor, Tensor], Tensor], copies: int) -> None:
    module = stack(lambda x, w, n: (y := body(x, w, n), more(x, y)))
    found = outline_layers(module)
    assert found is not None
    assert len(found.copied) == copies
    wanted, given = module(X, *WEIGHTS), found.module(X, *WEIGHTS)
    assert all(map(torch.equal, given, wanted))


def test_a_mixed_up_operand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = equal_runs.find_equal_runs

    def mixed_up(graph: Any) -> list[equal_runs.EqualRun]:
        (run,) = real(graph)
        (first, *weights) = run.operands
        return [run._replace(operands=(first, *(w[:2] + w[:1:-1] for w in weights)))]

    monkeypatch.setattr("dartfx.passes.transform.outline_layers.find_equal_runs", mixed_up)
    with pytest.raises(Refusal, match="something else"):
        outline_layers(stack(body))


def test_a_graph_of_no_layers() -> None:
    assert outline_layers(make_fx(nn.ReLU(), tracing_mode="fake")(X)) is None
