"""A progress bar on stderr, for work of more than five seconds.

Not tqdm: ``repro.py`` runs where dartfx alone is installed, and dartfx does not depend on tqdm.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress"]

_LONG = 5.0  # seconds; anything shorter needs no bar
_WIDTH = 30


class Progress:
    """``with Progress("profile", 8) as progress:``, then ``progress.step()`` eight times.

    The bar appears after the first step from which the whole will take more than five seconds.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._shown = False
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def step(self) -> None:
        """One more of the steps is done."""
        self._done += 1
        taken = time.monotonic() - self._start
        whole = taken / self._done * self._total
        self._shown = self._shown or whole > _LONG
        if not self._shown:
            return
        bar = "#" * (_WIDTH * self._done // self._total)
        left = f"{max(whole - taken, 0):.0f} s left"
        line = f"\r{self._what} [{bar:<{_WIDTH}}] {self._done}/{self._total}, {left:<12}"
        print(line, end="", file=sys.stderr, flush=True)  # noqa: T201  its reader is a terminal

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            print(file=sys.stderr)  # noqa: T201
