"""Which values are equal on all ranks, on graphs small enough to determine by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from dartfx.passes.distributed import sync_selection
from dartfx.passes.distributed.rank_placement import (
    RankPlacement,
    RankPlacements,
    Replicate,
    Shard,
    Unknown,
)
from dartfx.passes.distributed.shards import SHARDS_KEY, Shards
from dartfx.passes.refusal import Refusal
from dartfx.passes.selection import ByOperator

B, S, D, H, DH, RANKS, GROUP = 2, 7, 12, 2, 3, 2, "g"
LOCAL = H * DH
COLUMNS, ROWS = Shards(GROUP, 0, RANKS), Shards(GROUP, 1, RANKS)
HIDDEN = (B, S, D), None
c10d = torch.ops._c10d_functional


def traced(function: Callable[..., Any], *inputs: tuple[tuple[int, ...], Shards | None]) -> Graph:
    """Pre-dispatch ATen of a function of float tensors, each with how it is split over ranks."""
    with FakeTensorMode() as mode, torch.no_grad():
        values = [torch.empty(shape) for shape, _ in inputs]
        with mode:
            graph = make_fx(function, pre_dispatch=True)(*values).graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, (_, shards) in zip(placeholders, inputs, strict=True):
        node.meta["tensor_dict"] = {} if shards is None else {SHARDS_KEY: shards}
    return graph


def placement(
    function: Callable[..., Any], *inputs: tuple[tuple[int, ...], Shards | None]
) -> RankPlacement:
    """Of what the function returns."""
    graph = traced(function, *inputs)
    (output,) = graph.find_nodes(op="output")
    returned = output.args[0]
    assert isinstance(returned, Node)
    return RankPlacements(graph).of(returned)


def summed(value: Tensor) -> Tensor:
    total: Tensor = c10d.wait_tensor(c10d.all_reduce(value, "sum", GROUP))
    return total


def heads(x: Tensor, heads: int = H) -> Tensor:
    return x.view(B, S, -1, x.shape[-1] // heads).transpose(1, 2)


WEIGHT, BIAS = ((LOCAL, D), COLUMNS), ((LOCAL,), COLUMNS)
linear = torch.nn.functional.linear


def rotated(k: Tensor) -> Tensor:
    half = k.shape[-1] // 2
    return torch.cat([-k[..., half:], k[..., :half]], -1)


CARRIED: dict[str, tuple[Callable[..., Any], RankPlacement, list[Any]]] = {
    "keys": (lambda x, w: heads(linear(x, w)), Shard(1), [HIDDEN, WEIGHT]),
    "with bias": (lambda x, w, b: heads(linear(x, w, b)), Shard(1), [HIDDEN, WEIGHT, BIAS]),
    "one head": (lambda x, w: heads(linear(x, w), 1), Shard(1), [HIDDEN, WEIGHT]),
    "one head, rotated": (
        lambda x, w: rotated(heads(linear(x, w), 1)) + heads(linear(x, w), 1),
        Shard(1),
        [HIDDEN, WEIGHT],
    ),
    "normed heads": (
        lambda x, w: heads(linear(x, w)) * heads(linear(x, w)).pow(2).mean(-1, True).rsqrt(),
        Shard(1),
        [HIDDEN, WEIGHT],
    ),
    "one of two chunks": (
        lambda x, w: heads(linear(x, w)).split(1, -1)[1],
        Shard(1),
        [HIDDEN, WEIGHT],
    ),
    "appended to nothing": (
        lambda x, w: torch.cat([x.new_empty(0), heads(linear(x, w))], -2),
        Shard(1),
        [HIDDEN, WEIGHT],
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_split_is_followed_to_the_keys(name: str) -> None:
    function, expected, inputs = CARRIED[name]
    assert placement(function, *inputs) == expected


LOST: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "a part of a sum": (linear, [((B, S, LOCAL), COLUMNS._replace(dim=2)), ((D, LOCAL), ROWS)]),
    "the sum over heads": (
        lambda x, w: heads(linear(x, w)).sum(1),
        [HIDDEN, WEIGHT],
    ),
    "some of the heads": (lambda x, w: heads(linear(x, w))[:, :1], [HIDDEN, WEIGHT]),
    "heads in another order": (lambda x, w: heads(linear(x, w)).flip(1), [HIDDEN, WEIGHT]),
    "split two ways": (
        lambda x, w: linear(x, w) * linear(x, w).transpose(1, 2).reshape(B, S, LOCAL),
        [HIDDEN, WEIGHT],
    ),
    "drawn on each rank": (lambda x, w: torch.rand_like(x) * w.sum(), [HIDDEN, WEIGHT]),
    "a packed parameter": (linear, [HIDDEN, ((LOCAL, D), Shards(GROUP, None, RANKS))]),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_not_a_split_is_not_taken_for_one(name: str) -> None:
    function, inputs = LOST[name]
    assert isinstance(placement(function, *inputs), Unknown)


def test_a_sum_over_ranks_is_the_same_everywhere_also_in_place() -> None:
    def layer(x: Tensor, w: Tensor, back: Tensor) -> Tensor:
        part = linear(linear(x, w), back)
        part.copy_(summed(part))
        return x + part

    inputs = HIDDEN, WEIGHT, ((D, LOCAL), ROWS)
    assert placement(layer, *inputs) is Replicate
    assert isinstance(placement(lambda x, w, b: x + linear(linear(x, w), b), *inputs), Unknown)


def test_a_write_reaches_every_view() -> None:
    def written(x: Tensor, w: Tensor) -> Tensor:
        base = x.clone()
        seen = base.view(B * S, D)
        base.copy_(linear(x, w))
        return seen + 1

    assert isinstance(placement(written, HIDDEN, ((D, D), COLUMNS)), Unknown)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([HIDDEN, ((LOCAL, D), None)], "no parameter shows how it is sharded"),
        ([((B, S, D), COLUMNS), ((LOCAL, D), Shards("h", 0, 2))], "2 process groups at once"),
    ],
)
def test_what_parameters_do_not_show_is_refused(inputs: list[Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        placement(lambda x, w: summed(linear(x, w)), *inputs)


def test_a_sum_of_what_looks_equal_is_refused() -> None:
    with pytest.raises(Refusal, match="looks the same on all of them"):
        placement(lambda x, w: summed(x) + linear(x, w).sum(), HIDDEN, WEIGHT)


def test_one_process_has_no_group() -> None:
    assert RankPlacements(traced(lambda x, w: linear(x, w), HIDDEN, ((LOCAL, D), None))).group == ""


def test_the_proof_knows_numbers_but_not_what_is_summed_over_ranks() -> None:
    def proof(add: float, inside: float) -> str:
        graph = traced(lambda x, w: summed(linear(x, w) * inside) + add, HIDDEN, WEIGHT)
        (output,) = graph.find_nodes(op="output")
        return RankPlacements(graph).proof(output.all_input_nodes[0])

    assert proof(1.0, 2.0) == proof(1.0, 3.0)
    assert proof(1.0, 2.0) != proof(2.0, 2.0)


# --- the selection over ranks --------------------------------------------------------------------


def selecting(keys: Callable[..., Tensor], hidden: Callable[..., Tensor] = lambda x, w: x) -> Any:
    def select(x: Tensor, w: Tensor) -> Tensor:
        mask = torch.zeros(B, S, dtype=torch.bool)
        return torch.ops.dartfx.select_tokens(
            hidden(x, w), keys(x, w), mask, None, 4, 2, 1, 1, "dart", "auto"
        )

    return select


def united(function: Callable[..., Any], reads: str = "norms", checks: bool = False) -> list[str]:
    """The operators between the local keys and the selection, and behind it."""
    graph = traced(function, HIDDEN, WEIGHT)
    (select,) = graph.find_nodes(op="call_function", target=torch.ops.dartfx.select_tokens.default)
    before = set(graph.nodes)
    select_by = ByOperator(select.target, reads=reads, checks_ranks=checks)  # type: ignore[arg-type]
    keep, across = sync_selection.sync_selection(select, select_by)
    assert across is not None
    assert (across.group, across.ranks) == (GROUP, RANKS)
    assert (keep is select) != checks
    graph.lint()
    return [n.target._opname for n in graph.nodes if n not in before]


def test_norms_are_summed_over_ranks() -> None:
    added = united(selecting(lambda x, w: heads(linear(x, w))))
    assert added == ["abs", "sum", "all_reduce", "wait_tensor"]


def test_all_heads_are_gathered_for_a_selector_that_reads_them() -> None:
    added = united(selecting(lambda x, w: heads(linear(x, w))), "heads", checks=True)
    assert added[1:3] == ["all_gather_into_tensor", "wait_tensor"]
    assert added[-6:] == [
        "hash_indices", "all_gather_into_tensor", "wait_tensor", "slice", "eq", "require_rows",
    ]  # fmt: skip


def test_keys_that_all_ranks_hold_are_left_alone() -> None:
    assert united(selecting(lambda x, w: heads(x, 4))) == []


@pytest.mark.parametrize(
    ("keys", "hidden", "message"),
    [
        (lambda x, w: linear(x, w)[:, None], lambda x, w: x, "not by their heads alone"),
        (lambda x, w: heads(linear(x, w)).flip(1), lambda x, w: x, "to be the same on every rank"),
        (lambda x, w: heads(x, 4), linear, "to be the same on every rank"),
    ],
)
def test_what_ranks_might_select_differently_is_refused(
    keys: Callable[..., Tensor], hidden: Callable[..., Tensor], message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        united(selecting(keys, hidden))
