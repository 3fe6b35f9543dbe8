"""Checks that the host reads are taken out of graphs whose launches are recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from dartfx.backend.split_checks import Checks, split_checks
from dartfx.passes.graph import aten, packet
from dartfx.runtime.prefill.recorded import Recorded

Forward = Callable[[Tensor, Tensor], Tensor]
IDS, X = torch.tensor([7, 1]), torch.ones(2)


def traced(forward: Forward) -> GraphModule:
    return make_fx(forward, tracing_mode="symbolic")(IDS, X)


def called(module: GraphModule) -> list[object]:
    return [packet(node) for node in module.graph.nodes if node.op == "call_function"]


def check(value: Tensor) -> None:
    aten._assert_scalar(value.long().item() >= 1, "no placeholder")


def checked(ids: Tensor, x: Tensor) -> Tensor:
    check((ids == 7).any())
    return x * 2


def test_the_rest_holds_nothing_that_the_host_reads() -> None:
    module = traced(checked)
    before = str(module.graph)
    split = split_checks(module)
    assert split is not None
    assert str(module.graph) == before
    assert called(split.rest) == [aten.mul]
    assert aten._assert_scalar in called(split.check)
    assert not split.reads.graph.find_nodes(op="placeholder", target="x_1"), "only what it reads"

    run = Recorded(split.rest, check=Checks(split, split.reads))
    symbols = len(module.graph.find_nodes(op="placeholder")) - 2
    assert torch.equal(run(*[2] * symbols, IDS, X), X * 2)
    with pytest.raises(RuntimeError, match="no placeholder"):
        run(*[2] * symbols, torch.tensor([3, 3]), X)


def decides_a_shape(ids: Tensor, x: Tensor) -> Tensor:
    check((ids == 7).any())
    length = ids[0].item()
    torch._check(length >= 0)
    return x.new_zeros((length,))


def behind_a_product(ids: Tensor, x: Tensor) -> Tensor:
    check((x.view(1, 2) @ x.view(2, 1) == 2).any())
    return x * 2


def behind_a_write(ids: Tensor, x: Tensor) -> Tensor:
    ids[:1].add_(1)
    check((ids == 8).any())
    return x * 2


@pytest.mark.parametrize("forward", [decides_a_shape, behind_a_product, behind_a_write])
def test_others_stay(forward: Forward) -> None:
    assert split_checks(traced(forward)) is None


def test_a_graph_without_checks_stays() -> None:
    assert split_checks(traced(lambda ids, x: x * ids)) is None
