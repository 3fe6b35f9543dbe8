"""Which dims share an axis: decided by operators, never by coincidentally equal sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from dartfx.passes.analysis.token_axes import infer_axes
from dartfx.passes.frontend.causal_windows import CAUSAL_CONV1D, fold_windows
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.graph import aten, sizes
from tests.passes.golden.graph_text import dynamo_graph

Pairs = set[tuple[int, int]]


class Traced:
    """The axes of a function's graph, its inputs and its outputs."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...], symbolic: bool):
        mode = "symbolic" if symbolic else "fake"
        inputs = [torch.rand(s) for s in shapes]
        graph = make_fx(function, tracing_mode=mode, pre_dispatch=True)(*inputs).graph
        self.axes = infer_axes(graph)
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        returned = next(n for n in graph.nodes if n.op == "output").args[0]
        self.outputs: list[Node] = list(returned) if isinstance(returned, tuple) else [returned]

    def ties(self, source: int = 0, result: int = 0) -> Pairs:
        """Every (input dim, output dim) that is one axis."""
        a, b = self.inputs[source], self.outputs[result]
        return {
            (i, j)
            for i in range(len(sizes(a)))
            for j in range(len(sizes(b)))
            if self.axes.same((a, i), (b, j))
        }

    def factors(self, dim: int, source: int = 0) -> list[int]:
        """The dims of an input that an output dim is the product of."""
        return [
            next(
                d
                for d in range(len(sizes(self.inputs[source])))
                if self.axes.same((self.inputs[source], d), factor)
            )
            for factor in self.axes.factors((self.outputs[0], dim))
        ]


def traced(
    function: Callable[..., Any], *shapes: tuple[int, ...], symbolic: bool = False
) -> Traced:
    return Traced(function, *shapes, symbolic=symbolic)


ONE_TO_ONE: dict[str, tuple[Callable[..., Any], tuple[int, ...], Pairs]] = {
    # view: S, heads, head_dim and the batch all 4
    "split heads": (lambda x: x.view(4, 4, 4, 4), (4, 4, 16), {(0, 0), (1, 1)}),
    "join heads": (lambda x: x.reshape(4, 4, 16), (4, 4, 4, 4), {(0, 0), (1, 1)}),
    "view to itself": (lambda x: x.view(4, 4, 4), (4, 4, 4), {(0, 0), (1, 1), (2, 2)}),
    "regrouped": (lambda x: x.reshape(6, 2), (4, 3), set()),
    "split in front": (lambda x: x.view(2, 2, 4), (4, 4), {(1, 2)}),
    "bytes": (lambda x: x.view(torch.int32), (4, 4), set()),
    # size-1 dims carry no axis, but must not shift their neighbours
    "one in front": (lambda x: x.view(1, 4, 4), (4, 4), {(0, 1), (1, 2)}),
    "one between": (lambda x: x.view(4, 1, 4), (4, 4), {(0, 0), (1, 2)}),
    "one dropped": (lambda x: x.view(4, 4), (4, 1, 4), {(0, 0), (2, 1)}),
    "one moved": (lambda x: x.view(4, 4, 1), (1, 4, 4), {(1, 0), (2, 1)}),
    "flatten": (lambda x: x.flatten(2), (4, 4, 2, 2), {(0, 0), (1, 1)}),
    "unflatten": (lambda x: x.unflatten(-1, (2, -1)), (4, 4, 4), {(0, 0), (1, 1)}),
    "squeeze": (lambda x: x.squeeze(1), (4, 1, 4), {(0, 0), (2, 1)}),
    "unsqueeze": (lambda x: x.unsqueeze(-2), (4, 4), {(0, 0), (1, 2)}),
    # order
    "transpose": (lambda x: x.transpose(1, 2), (4, 4, 4), {(0, 0), (1, 2), (2, 1)}),
    "transpose twice": (lambda x: x.mT.mT, (4, 4, 4), {(0, 0), (1, 1), (2, 2)}),
    "permute": (lambda x: x.permute(2, 0, 1), (4, 4, 4), {(0, 1), (1, 2), (2, 0)}),
    # repetition and joining
    "expand": (lambda x: x.expand(4, 4, 4), (1, 4, 4), {(1, 1), (2, 2)}),
    "expand in front": (lambda x: x.expand(4, 4, 4), (4, 4), {(0, 1), (1, 2)}),
    "repeat": (lambda x: x.repeat(1, 1, 2), (4, 4, 2), {(0, 0), (1, 1)}),
    "cat of ends": (lambda x: torch.cat([x[..., 1:], x[..., :1]], 2), (4, 4, 4), {(0, 0), (1, 1)}),
    "cat of tokens": (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), (4, 4, 4), {(0, 0), (2, 2)}),
    "stack": (lambda x: torch.stack([x, x, x, x], 1), (4, 4), {(0, 0), (1, 2)}),
    "unbind": (lambda x: x.unbind(1)[0], (4, 4, 4), {(0, 0), (2, 1)}),
    "split": (lambda x: x.split(2, dim=-1)[1], (4, 4, 4), {(0, 0), (1, 1)}),
    # ranges and reductions
    "part of a dim": (lambda x: x[:, 1:], (4, 4, 4), {(0, 0), (2, 2)}),
    "all of a dim": (lambda x: x[:, :4], (4, 4, 4), {(0, 0), (1, 1), (2, 2)}),
    "one of a dim": (lambda x: x[:, -1], (4, 4, 4), {(0, 0), (2, 1)}),
    "sum": (lambda x: x.sum(1), (4, 4, 4), {(0, 0), (2, 1)}),
    "mean that keeps": (lambda x: x.mean(1, keepdim=True), (4, 4, 4), {(0, 0), (2, 2)}),
    "padded": (lambda x: F.pad(x, (0, 0, 1, 0)), (4, 4, 4), {(0, 0), (2, 2)}),
    "square by itself": (lambda x: x @ x.mT, (4, 4, 3), {(0, 0), (1, 1), (1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize(("function", "shape", "pairs"), ONE_TO_ONE.values(), ids=ONE_TO_ONE)
def test_one_axis(function: Callable[..., Any], shape: tuple[int, ...], pairs: Pairs) -> None:
    assert traced(function, shape).ties() == pairs


def test_dims_of_one_input_stay_apart() -> None:
    found = traced(lambda x: x.view(4, 4, 2, 2).transpose(1, 2).softmax(-1), (4, 4, 4))
    x = found.inputs[0]
    assert not any(found.axes.same((x, a), (x, b)) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_cat_with_an_empty_part() -> None:
    """A fresh KV cache starts as an empty tensor: joined with it, the tokens stay the tokens."""
    found = traced(lambda old, new: torch.cat([old, new], -2), (4, 4, 0, 4), (4, 4, 4, 4))
    assert found.ties(1) == {(0, 0), (1, 1), (2, 2), (3, 3)}
    held = traced(lambda old, new: torch.cat([old, new], -2), (4, 4, 2, 4), (4, 4, 2, 4))
    assert held.ties(1) == {(0, 0), (1, 1), (3, 3)}


@pytest.mark.parametrize("symbolic", [False, True])
def test_product_and_its_factors(symbolic: bool) -> None:
    found = traced(lambda x: x.reshape(x.shape[0] * x.shape[1], -1), (3, 5, 4), symbolic=symbolic)
    assert found.ties() == {(2, 1)}
    assert found.factors(0) == [0, 1]
    assert found.factors(1) == []


@pytest.mark.parametrize("symbolic", [False, True])
def test_product_split_again(symbolic: bool) -> None:
    def rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        return F.linear(x.view(b * s, width), w).relu().view(b, s, -1)

    found = traced(rows, (3, 5, 4), (7, 4), symbolic=symbolic)
    assert found.ties() == {(0, 0), (1, 1)}
    assert found.ties(1) == {(0, 2)}


@pytest.mark.parametrize("symbolic", [False, True])
def test_product_split_another_way_is_no_axis(symbolic: bool) -> None:
    """[B, S] -> B*S -> [S, B]: the same sizes in another order are other dims."""

    def swapped(x: torch.Tensor) -> torch.Tensor:
        b, s = x.shape
        return x.view(b * s).view(s, b)

    assert traced(swapped, (3, 5), symbolic=symbolic).ties() == set()


def test_product_of_a_square_is_split_in_memory_order() -> None:
    found = traced(lambda x: x.transpose(0, 1).reshape(16).view(4, 4), (4, 4))
    assert found.ties() == {(0, 1), (1, 0)}


def test_symbolic_sizes() -> None:
    """Duck-shaped: every size of 4 is one symbol, so sizes could not tell the dims apart."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        return x.view(b, s, 2, -1).transpose(1, 2)

    assert traced(heads, (4, 4, 4), symbolic=True).ties() == {(0, 0), (1, 2)}


def test_operands_of_one_product() -> None:
    found = traced(lambda q, k: q @ k.transpose(-2, -1), (4, 4, 4, 4), (4, 4, 4, 4))
    assert found.ties(0) == {(0, 0), (1, 1), (2, 2)}
    assert found.ties(1) == {(0, 0), (1, 1), (2, 3)}
    query, key = found.inputs
    assert not found.axes.same((query, 2), (key, 2))


def test_attention_keeps_queries_and_keys_apart() -> None:
    found = traced(F.scaled_dot_product_attention, *[(4, 4, 4, 4)] * 4)
    query, key, value, mask = ((n, -2) for n in found.inputs)
    assert found.ties(0) == {(0, 0), (1, 1), (2, 2)}
    assert found.axes.same(key, value)
    assert not found.axes.same(query, key)
    assert found.axes.same(mask, query)
    assert found.axes.same((mask[0], -1), key)


def test_broadcast_tells_places_but_ties_nothing() -> None:
    found = traced(lambda x, table: x * table, (4, 4, 4), (1, 4, 4))
    x, table = found.inputs
    assert not found.axes.same((x, 0), (table, 0))
    assert found.axes.aligned((x, 0), (table, 0))
    assert not found.axes.aligned((x, 1), (table, 0))


def test_einsum_letters() -> None:
    found = traced(lambda x, w: torch.einsum("bsc,hdc->bhsd", x, w), (4, 4, 4), (4, 4, 4))
    assert found.ties(0) == {(0, 0), (1, 2)}
    assert found.ties(1) == {(0, 1), (1, 3)}


def test_embedding_keeps_the_dims_of_its_indices() -> None:
    found = traced(lambda w, i: F.embedding(i.long(), w), (4, 4), (4, 4))
    assert found.ties(1) == {(0, 0), (1, 1)}
    assert (0, 0) not in found.ties(0)


def test_a_causal_window_is_found_behind_slices_that_keep_all() -> None:
    """Of 32 rows torch slices the batch, too, which it does not of two."""
    conv = nn.Conv1d(4, 4, 3, groups=4, padding=2)

    def window(x: Tensor) -> Tensor:
        whole: Tensor = conv(x)
        return whole[:, :, : x.shape[2]]

    x = torch.rand(32, 4, 6)
    module = normalise(dynamo_graph(window, x, symbolic=[(0, 0), (0, 2)]))
    assert len(module.graph.find_nodes(op="call_function", target=aten.slice.Tensor)) == 2
    fold_windows(module.graph)
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert targets == [CAUSAL_CONV1D.default]
