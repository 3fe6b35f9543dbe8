"""Which kernels a call launches on a GPU, how long each takes there, and the call's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dartfx.tools.bench.timing import wait

__all__ = ["launches", "peak_bytes"]

_CALLS = 20


def launches(call: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Kernels and copies of one call in the order of their time: ``number`` and ``seconds``.

    seconds: on the device, all launches of that name in one call together, a mean over several
    calls.  call: warm, so that nothing compiles any more.
    """
    wait()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(_CALLS):
            call()
        wait()
    events = [e for e in profiled.key_averages() if e.device_type.name == "CUDA"]
    events.sort(key=lambda e: e.self_device_time_total, reverse=True)
    return {
        e.key: {"number": e.count / _CALLS, "seconds": e.self_device_time_total * 1e-6 / _CALLS}
        for e in events
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call allocates on a GPU at a time, beyond what is there before it."""
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait()
    return torch.cuda.max_memory_allocated() - before
