"""Measuring the rows of ``bench generate``: warm-up, interleaved calls, memory, refusals."""

from __future__ import annotations

import gc
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import chain
from statistics import median
from typing import Any

import torch

from dartfx.passes.outcome import Pruned
from dartfx.tools.bench.generate.kernels import kernels_of
from dartfx.tools.bench.generate.variants import VARIANTS, Ready, Settings
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.bench.timing import seconds, wait

__all__ = [
    "Progress",
    "Row",
    "prepare",
    "profiled",
    "reason",
    "rewarm",
    "time_round",
    "vision_seconds",
    "weight_bytes",
]

_REASON_LENGTH = 600  # characters of a reason; a C++ compiler's may be thousands of lines


def reason(error: Exception) -> str:
    """Why a row has no figures, in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", _REASON_LENGTH, placeholder=" ...")


@dataclass
class Row:
    """One variant while it is measured; once ``failed`` says why, nothing else of it counts."""

    name: str
    label: str
    samples: dict[int, list[float]]
    ready: Ready | None = None
    failed: str = ""
    pruned: Pruned | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    warmup_seconds: float = 0.0

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Turn an exception into the reason why this row has no figures."""
        try:
            yield
        except Exception as error:
            self.failed = reason(error)
            self.ready = None

    def totals(self) -> dict[int, float]:
        """Median seconds by number of new tokens."""
        return {n: median(samples) for n, samples in self.samples.items()}


@dataclass
class Progress:
    """A bar over all calls, and what is called at the moment."""

    bar: Any
    lengths: list[int]
    towers: list[float] = field(default_factory=list)

    def count(self, label: str) -> None:
        """Count a call made elsewhere."""
        self.bar.set_description(label)
        self.bar.update()

    def step(self, row: Row, call: Callable[[], object]) -> None:
        """Make a call of ``row`` unless it has failed before."""
        self.bar.set_description(row.label)
        if not row.failed:
            with row.attempt():
                call()
        self.bar.update()


def prepare(row: Row, work: Workload, settings: Settings, progress: Progress, warmup: int) -> None:
    """Build and compile a row, run it until nothing compiles any more, and weigh it."""
    on_cuda = work.model.device.type == "cuda"
    before = 0
    if on_cuda:
        gc.collect()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with row.attempt():
        row.ready = VARIANTS[row.name][1](work, settings)
    # The longest first: transformers then gives the shorter ones the same static cache.
    for n in reversed(progress.lengths):
        for _ in range(warmup):
            progress.step(row, lambda n=n: row.ready.generate(n))  # type: ignore[misc]
    row.warmup_seconds = time.perf_counter() - start
    with row.attempt():
        if row.ready is None:
            return
        row.pruned = row.ready.check()
        row.kv_bytes = row.ready.kv_bytes()
        if on_cuda:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            row.ready.generate(1)
            wait()
            row.peak_bytes = torch.cuda.max_memory_allocated() - before + weight_bytes(work)


def profiled(row: Row) -> dict[str, Any]:
    """What one generated token does on the GPU and on the host; why it failed, if it did."""
    try:
        if row.ready is None:
            return {"failed": row.failed}
        found = kernels_of(partial(row.ready.generate, 1), median(row.samples[1]))
        prefills = getattr(row.ready.model._compiled_call_impl, "prefills", None)
        if prefills is not None:
            recordings = prefills.recordings
            found |= {"recorded": recordings.made, "recorded_bytes": recordings.recorder.bytes}
        return found
    except Exception as error:
        return {"failed": reason(error)}


def rewarm(rows: list[Row]) -> None:
    """One call of each after a wait, so that none pays for cold caches or for memory given back."""
    for row in rows:
        with row.attempt():
            if row.ready is not None:
                row.ready.generate(1)


def time_round(rows: list[Row], work: Workload, progress: Progress) -> None:
    """One timed call of each length of each row, in turns, and the vision tower between them."""
    tower = vision_seconds(work)
    if tower is not None:
        progress.towers.append(tower)
    for n in progress.lengths:
        for row in rows:

            def timed(row: Row = row, n: int = n) -> None:
                assert row.ready is not None
                generate = row.ready.generate
                row.samples[n].append(seconds(lambda: generate(n)))

            progress.step(row, timed)


def vision_seconds(work: Workload) -> float | None:
    """Seconds of vision tower and projector in one eager ``generate``; None where not separated.

    transformers calls ``get_image_features`` of the base model for each prompt.
    """
    base = work.model.base_model
    features = getattr(base, "get_image_features", None)
    if features is None:
        return None
    spent: list[float] = []

    @wraps(features)
    def timed(*args: Any, **kwargs: Any) -> Any:
        made: list[Any] = []
        spent.append(seconds(lambda: made.append(features(*args, **kwargs))))
        return made[0]

    base.get_image_features = timed
    try:
        work.model.generate(**work.inputs, max_new_tokens=1, do_sample=False)
    finally:
        del base.get_image_features  # the class's own is left
    return sum(spent) if spent else None


def weight_bytes(work: Workload) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in chain(work.model.parameters(), work.model.buffers()))
