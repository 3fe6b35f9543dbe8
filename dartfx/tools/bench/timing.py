"""What the benchmarks share: the machine's name, samples in turns, models side by side."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["alternate", "cache_bytes", "device_name", "seconds", "twin", "wait"]


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the number of threads torch uses."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def wait() -> None:
    """Return when the GPU's queue, if there is one, is empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by this clock, with the GPU's queue empty before and after."""
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def alternate(
    calls: Sequence[Callable[[], object]],
    repeat: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds of each call, run in turns (A B A B ...) so that all meet the same load."""
    for _ in range(warmup):
        for call in calls:
            call()
    timed = [[seconds(call, clock) for call in calls] for _ in range(repeat)]
    return [list(column) for column in zip(*timed, strict=True)]


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with ``model``."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a transformers KV cache, unused slots included."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
