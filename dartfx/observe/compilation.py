"""The cost of compiling a graph: seconds by step, kernels, and layers compiled once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dartfx import compat

__all__ = ["Compilation"]

# Torch's timers.  A region's timers end before those of the graph that calls it, so the last entry
# of each is the whole graph's.
_AOT, _INDUCTOR = "create_aot_dispatcher_function", "compile_fx.<locals>.fw_compiler_base"
_STEPS = {
    "graph passes": ("_recursive_joint_graph_passes", "_recursive_post_grad_passes"),
    "lowering": ("GraphLowering.run",),
    "code generation": ("GraphLowering.codegen",),
    "kernels": ("PyCodeCache.load_by_key_path",),
}


@dataclass
class Compilation:
    """Filled in while a graph is compiled.

    seconds: by step, of wall time; "kernels" is what Inductor waits for the C++ or Triton compiler,
    which may overlap with other steps.  kernels: calls of kernels in the code; 0 from a cache.
    cached: whether Inductor or AOTAutograd had the code in its cache.  outlined: for every subgraph
    that stands for equal layers, its calls and its operators; flat: why there is none.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    kernels: int = 0
    cached: bool = False
    outlined: list[tuple[int, int]] = field(default_factory=list)
    flat: str = ""

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure torch inside the ``with`` block; nothing where it has other timers."""
        timers, counts = compat.find("compilation_time_metrics"), _counts()
        before = {name: len(entries) for name, entries in (timers or {}).items()}
        start = time.perf_counter()
        yield
        total = time.perf_counter() - start

        def spent(name: str) -> float:
            entries = (timers or {}).get(name, [])
            return float(entries[-1]) if len(entries) > before.get(name, 0) else 0.0

        steps = {step: sum(map(spent, names)) for step, names in _STEPS.items()}
        inductor = spent(_INDUCTOR)
        steps = {"AOTAutograd": max(spent(_AOT) - inductor, 0.0), **steps}
        steps["other"] = max(total - sum(steps.values()), 0.0)
        self.seconds |= {step: round(seconds, 3) for step, seconds in steps.items()}
        kernels, hits = _counts()
        self.kernels, self.cached = kernels - counts[0], hits > counts[1]


def _counts() -> tuple[int, int]:
    """Kernels generated and cache hits of this process so far."""
    metrics, counters = compat.find("inductor_metrics"), compat.find("counters")
    hits = ("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit")
    found = sum(counters[group][name] for group, name in hits) if counters is not None else 0
    return getattr(metrics, "generated_kernel_count", 0), found
