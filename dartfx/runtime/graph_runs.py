"""Tracks which compiled graphs ran in a call, and whether any concerned vision tokens.

A graph reports its outcome once, when it is compiled.  A call whose graphs torch did not run (past
``recompile_limit``, under a stance, inside another mode) would go unreported, so every graph
records that it ran.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from dartfx import compat
from dartfx.errors import PruningWarning
from dartfx.runtime.collecting import collecting

__all__ = ["NotedRun", "collect_runs", "note_run", "warn_at_limit"]

_collected: ContextVar[list[bool] | None] = ContextVar("dartfx_graph_runs", default=None)


def collect_runs() -> AbstractContextManager[list[bool]]:
    """Collect a bool per graph run inside the ``with`` block: does it concern vision tokens?"""
    return collecting(_collected)


def note_run(vision: bool) -> None:
    """Record a graph's run.  vision: it prunes or merges vision tokens, or was refused."""
    if (collected := _collected.get()) is not None:
        collected.append(vision)


def warn_at_limit() -> None:
    """Warn when dynamo compiles the code of a pruned graph for the last time.

    Past its limit dynamo runs the code eagerly, and nothing of dartfx runs that could report it.
    """
    context, settings = compat.find("CompileContext"), compat.find("dynamo_config")
    frame = None if context is None else context.current_compile_id()
    limit = getattr(settings, "recompile_limit", None)
    if frame is not None and limit is not None and frame.frame_compile_id == limit - 1:
        warnings.warn(
            f"torch._dynamo.config.recompile_limit={limit} lets dynamo compile this model no "
            "more: calls of other kinds or sizes will run unpruned, and only dynamo's log will say "
            "so. Raise the limit, or use dartfx.compile(model), which reports each such call",
            PruningWarning,
            stacklevel=2,
        )


class NotedRun:
    """Runs a compiled graph and records that it ran."""

    def __init__(self, compiled: Callable[..., Any], vision: bool) -> None:
        self._compiled, self._vision = compiled, vision

    def __call__(self, *args: Any) -> Any:
        note_run(self._vision)
        return self._compiled(*args)
