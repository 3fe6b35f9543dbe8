"""Lets concurrent benchmarks compile at the same time, but be timed one after the other."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO

__all__ = ["Gate"]


class Gate:
    """A lock on a file, shared from entering on, and one process's own from ``alone`` to leaving.

    So no process is alone while another that has entered still compiles.  The system drops the
    lock of a process that dies.  Without a file it does nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Gate:
        if self._path is not None:
            import fcntl  # not on Windows

            self._file = self._path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return self

    def alone(self) -> None:
        """Wait until no other process is inside, but for those that wait here as well."""
        if self._file is not None:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
