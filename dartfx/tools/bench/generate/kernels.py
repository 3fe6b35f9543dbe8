"""What a call does on the GPU and on the host: kernels, the gaps between them, launches, guards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

from dartfx.tools.bench.generate.figures import markdown
from dartfx.tools.bench.timing import wait

__all__ = ["Kernel", "kernels_of", "profile_table", "summary"]

_CALL = "dartfx bench: call"
_TOP = 12  # kernels, gaps and steps of the host that are listed

# How torch names the steps of a compiled call on the host, and launches.
_STEPS = (
    "TorchDynamo",
    "Torch-Compiled",
    "Pregraph",
    "AOTDispatcher",
    "## Call",
    "CompiledFxGraph",
)
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Kernel(NamedTuple):
    """One kernel or copy on the device, in microseconds."""

    start: float
    end: float
    name: str


def kernels_of(call: Callable[[], object], seconds: float) -> dict[str, Any]:
    """One call under the profiler; ``seconds``: what it takes without, as its median.

    call: warm, so that nothing compiles any more.
    """
    call()
    wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with record_function(_CALL):
            call()
        wait()
    events = list(profiled.events() or ())
    kernels = [
        Kernel(e.time_range.start, e.time_range.end, e.name)
        for e in events
        # Steps of the host are shown on the device, too, from their first kernel to the last.
        if e.device_type.name == "CUDA" and not e.name.startswith((_CALL, *_STEPS))
    ]
    host = [e for e in events if e.device_type.name == "CPU"]
    start = next(e.time_range.start for e in host if e.name == _CALL)
    spent: dict[str, float] = {}
    for event in host:
        if event.name.startswith((*_STEPS, *_WAITS)):
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us() * 1e-6
    launches = Counter(e.name for e in host if e.name.startswith(_LAUNCHES))
    return {
        "seconds": seconds,
        **summary(kernels, start),
        "launches": dict(launches),
        "host": dict(sorted(spent.items(), key=lambda item: -item[1])[:_TOP]),
    }


def summary(kernels: Sequence[Kernel], start: float) -> dict[str, Any]:
    """Seconds on the device and between its kernels, of a call that began at ``start``."""
    kernels = sorted(k for k in kernels if k.end > k.start)
    busy, gaps, end = 0.0, [], kernels[0].start if kernels else start
    last = ""
    for kernel in kernels:
        if kernel.start > end:
            gaps.append((kernel.start - end, last, kernel.name))
        busy += max(0.0, kernel.end - max(kernel.start, end))
        end, last = max(end, kernel.end), kernel.name
    numbers = Counter(kernel.name for kernel in kernels)
    times = dict.fromkeys(numbers, 0.0)
    for kernel in kernels:
        times[kernel.name] += kernel.end - kernel.start
    longest = sorted(times.items(), key=lambda item: -item[1])[:_TOP]
    return {
        "kernels": len(kernels),
        "busy": busy * 1e-6,
        "before_first": (kernels[0].start - start) * 1e-6 if kernels else None,
        "between": sum(gap for gap, *_ in gaps) * 1e-6,
        "longest_gaps": [[g * 1e-6, *names] for g, *names in sorted(gaps, reverse=True)[:_TOP]],
        "top": [[name, numbers[name], t * 1e-6] for name, t in longest],
    }


def profile_table(found: Mapping[str, Any]) -> str:
    """The figures of every row, and its longest kernels and gaps."""
    head = [
        "one token, ms",
        "wall",
        "kernels",
        "launches",
        "before the first",
        "on the GPU",
        "idle",
    ]
    lines, more = [], []
    for name, row in found.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed'][:80]}", *["-"] * (len(head) - 2)])
            continue
        before = row["before_first"] or 0.0
        cells = [name, _ms(row["seconds"]), str(row["kernels"])]
        cells += [str(sum(row["launches"].values()))]
        lines.append([*cells, _ms(before), _ms(row["busy"]), _ms(row["between"])])
        if "recorded" in row:
            size = row["recorded_bytes"] / 1e6
            more += [f"\n{name}: {row['recorded']} recordings, {size:.0f} MB"]
        more += [f"\n{name}: longest kernels", *(_kernel(*each) for each in row["top"])]
        more += ["gaps", *(f"{_ms(g):>9} {a[:40]} -> {b[:40]}" for g, a, b in row["longest_gaps"])]
        more += ["host", *(f"{_ms(time):>9} {step[:80]}" for step, time in row["host"].items())]
    return "\n".join([markdown(head, lines), *more])


def _kernel(name: str, number: int, seconds: float) -> str:
    return f"{_ms(seconds):>9} {number:5d} x {name[:90]}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
