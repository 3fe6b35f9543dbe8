"""Lists that whoever opens a context gets filled by what runs inside it, thread by thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["listening"]

T = TypeVar("T")


@contextmanager
def listening(variable: ContextVar[list[T] | None]) -> Iterator[list[T]]:
    """A new list in ``variable`` for this context; what was there before comes back after it."""
    heard: list[T] = []
    token = variable.set(heard)
    try:
        yield heard
    finally:
        variable.reset(token)
