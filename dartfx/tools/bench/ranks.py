"""The cost that tensor parallelism adds to a selection: one exchange per prefill.

    torchrun --nproc-per-node 2 -m dartfx bench ranks

Timed are the all-reduce of the key norms (selector "dart"), the all-gather of all heads' keys (a
selector that reads keys otherwise), the comparison of the option check_ranks, and two
things that a decoder layer exchanges anyway.  Times are medians of the slowest rank's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

import dartfx.ops.rank_hash  # noqa: F401  registers torch.ops.dartfx.hash_indices
from dartfx.tools.bench.timing import device_name, seconds

__all__ = ["HELP", "configure", "run"]

HELP = "the exchange between tensor-parallel ranks (start it with torchrun)"


@dataclass(frozen=True)
class Shape:
    """A prefill: B rows of S tokens of D channels, ``kept`` of them left; H key heads of Dh."""

    B: int
    S: int
    D: int
    H: int
    Dh: int
    kept: int


SHAPES = {
    "7B, one image": Shape(1, 630, 4096, 32, 128, 118),
    "7B, five tiles": Shape(1, 2928, 4096, 32, 128, 368),
    "7B, batch of 8": Shape(8, 630, 4096, 32, 128, 118),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--repeat", type=int, default=50, help="samples of each (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table on the first rank; exit status 2 where no launcher started it."""
    if "RANK" not in os.environ:
        print("start it with torchrun --nproc-per-node 2 -m dartfx bench ranks")
        return 2
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = dist.get_rank() == 0
    if first:
        print(f"{device_name(device)}, {dist.get_world_size()} ranks, {dist.get_backend()}")
        print("\n| | key norms | all heads | check_ranks | a layer's own two |")
        print("|---|---:|---:|---:|---:|")
    for name, shape in SHAPES.items():
        cells = [f"{t * 1e6:.0f} us" for t in measure(shape, device, arguments.repeat)]
        if first:
            print(f"| {name}: B={shape.B} S={shape.S} | {' | '.join(cells)} |")
    dist.destroy_process_group()
    return 0


def measure(shape: Shape, device: torch.device, repeat: int) -> list[float]:
    """Median seconds of each exchange, of the rank that took longest."""
    ranks = dist.get_world_size()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    local = shape.H // ranks
    keys = torch.randn(shape.B, local, shape.S, shape.Dh, dtype=dtype, device=device)
    norms = torch.randn(shape.B, 1, shape.S, 1, device=device)
    hidden = torch.randn(shape.B, shape.S, shape.D, dtype=dtype, device=device)
    keep = torch.arange(shape.B * shape.kept, device=device).view(shape.B, -1)
    calls: list[Callable[[], object]] = [
        partial(_sum, norms),
        partial(_of_all, keys),
        partial(check, keep),
        partial(both_sums, hidden),
    ]
    with torch.inference_mode():
        return [slowest(call, device, repeat) for call in calls]


def check(keep: Tensor) -> bool:
    """The option check_ranks."""
    mine = torch.ops.dartfx.hash_indices(keep)
    of_all = _of_all(mine)
    return bool((of_all == of_all[0]).all())


def both_sums(hidden: Tensor) -> Tensor:
    """What the attention and the MLP of one layer sum over the ranks."""
    return _sum(_sum(hidden))


# The operators themselves, as they stand in the graph.


def _sum(value: Tensor) -> Tensor:
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(value, "sum", _group()))
    return summed


def _of_all(value: Tensor) -> Tensor:
    ops, ranks = torch.ops._c10d_functional, dist.get_world_size()
    gathered: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(value, ranks, _group()))
    return gathered


def _group() -> str:
    world = dist.group.WORLD
    assert world is not None
    return world.group_name


def slowest(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median seconds of a call that all ranks begin together, of the slowest rank."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(repeat):
        dist.barrier()
        samples.append(seconds(call))
    worst = torch.tensor(median(samples), device=device, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)
