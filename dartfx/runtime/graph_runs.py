"""Which compiled graphs ran in a call, and whether vision tokens had to do with any of them.

A graph that was compiled says what became of its vision tokens, once.  A call whose graphs torch
did not run (past ``recompile_limit``, under a stance, inside another mode) says nothing at all, so
every graph notes that it ran.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from dartfx.runtime.collecting import collecting

__all__ = ["NotedRun", "collect_runs", "note_run"]

_collected: ContextVar[list[bool] | None] = ContextVar("dartfx_graph_runs", default=None)


def collect_runs() -> AbstractContextManager[list[bool]]:
    """One bool per graph that runs inside the ``with`` block: does it concern vision tokens."""
    return collecting(_collected)


def note_run(vision: bool) -> None:
    """Note that a graph runs.  vision: it prunes or merges vision tokens, or was refused."""
    if (collected := _collected.get()) is not None:
        collected.append(vision)


class NotedRun:
    """Runs a compiled graph and notes that it ran."""

    def __init__(self, compiled: Callable[..., Any], vision: bool) -> None:
        self._compiled, self._vision = compiled, vision

    def __call__(self, *args: Any) -> Any:
        note_run(self._vision)
        return self._compiled(*args)
