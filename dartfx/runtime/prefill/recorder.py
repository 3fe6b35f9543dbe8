"""What records launches: CUDA graphs, and what else tests put in their place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Compiled", "CudaGraphs", "Recorder", "Replay"]

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Replay = Callable[[], object]


class Recorder(Protocol):
    """Records launches on one kind of device."""

    def here(self) -> torch.device:
        """The device of current launches."""

    def queue(self) -> object:
        """The current launch queue; a recording serves one queue."""

    def record(self, run: Compiled, args: Sequence[Any]) -> tuple[Replay, Sequence[Any]]:
        """Record ``run(*args)`` without running it; return its replay function and outputs."""


class CudaGraphs:
    """Records CUDA graphs, which share memory since no two run at once."""

    def __init__(self) -> None:
        self._pool: Any = None
        self.bytes = 0  # device memory used by recordings

    def here(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def queue(self) -> object:
        return torch.cuda.current_stream()

    def record(self, run: Compiled, args: Sequence[Any]) -> tuple[Replay, Sequence[Any]]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # Another thread may allocate memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run(*args)
        taken = torch.cuda.memory_reserved() - before
        self.bytes += taken
        log.info("recorded a prefill as a CUDA graph, which takes %.0f MB", taken / 1e6)
        return graph.replay, outputs
