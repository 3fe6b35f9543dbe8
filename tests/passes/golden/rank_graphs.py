"""Graphs of one rank out of two, made in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import embedding, linear
from torch.testing._internal.distributed.fake_pg import FakeStore

from dartfx import passes
from dartfx.passes.distributed.shards import SHARDS_KEY, Shards
from dartfx.passes.distributed.sync_selection import sync_selection
from dartfx.passes.distributed.to_local_tensors import to_local_tensors


@contextmanager
def rank_of_two() -> Iterator[DeviceMesh]:
    """The mesh of a process group without its other rank; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def local_tensors(dynamo_graph: Callable[..., GraphModule]) -> tuple[Graph, Graph]:
    """A vocabulary split over the ranks, looked up; and a split linear layer."""

    def block(ids: Tensor, table: DTensor, weight: DTensor) -> Tensor:
        ids = DTensor.from_local(ids, table.device_mesh, [Replicate()], run_check=False)
        found = embedding(ids, table).redistribute(placements=[Replicate()]).to_local()
        return linear(found, weight.to_local())

    with rank_of_two() as mesh, torch.no_grad():
        table, weight = (
            DTensor.from_local(torch.rand(4, 6), mesh, [Shard(0)], run_check=False)
            for _ in range(2)
        )
        module = dynamo_graph(block, torch.tensor([[1, 2, 3]]), table, weight, symbolic=[])
        return module.graph, to_local_tensors(module).module.graph


def synced_selection() -> tuple[Graph, Graph]:
    """A selection by key norms whose keys are split by heads; the check of the ranks behind it."""

    def select(hidden: Tensor, weight: Tensor, vision: Tensor) -> Tensor:
        keys = linear(hidden, weight).view(1, 7, 2, 3).transpose(1, 2)
        keep: Tensor = torch.ops.dartfx.select_tokens(
            hidden, keys, vision, None, 4, 2, 1, 1, "dart", "auto"
        )
        return keep

    inputs = torch.rand(1, 7, 12), torch.rand(6, 12), torch.zeros(1, 7, dtype=torch.bool)
    with torch.no_grad():
        graphs: list[Any] = [
            make_fx(select, tracing_mode="fake", pre_dispatch=True)(*inputs).graph for _ in range(2)
        ]
    before, after = graphs
    placeholders = after.find_nodes(op="placeholder")
    for node, shards in zip(placeholders, (None, Shards("group", 0, 2), None), strict=True):
        node.meta["tensor_dict"] = {} if shards is None else {SHARDS_KEY: shards}
    operator = torch.ops.dartfx.select_tokens.default
    (keep,) = after.find_nodes(op="call_function", target=operator)
    synced, across = sync_selection(
        keep, passes.ByOperator(operator, reads="norms", checks_ranks=True)
    )
    assert across is not None
    after.output_node().args = (synced,)
    return before, after
