"""Context-local collectors: record items produced inside a ``with`` block, thread by thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["collecting"]

T = TypeVar("T")


@contextmanager
def collecting(variable: ContextVar[list[T] | None]) -> Iterator[list[T]]:
    """A new list in ``variable`` for this context; the previous value is restored afterwards."""
    items: list[T] = []
    token = variable.set(items)
    try:
        yield items
    finally:
        variable.reset(token)
