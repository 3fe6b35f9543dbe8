"""Progress on stderr for anything longer than a few seconds; stdout is for results.

Countable work gets a bar. A compilation has no known length: its line shows the elapsed seconds.
If stderr is not a terminal, a compilation prints one plain line and a bar prints nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["counting", "working"]


def counting(what: str, total: int, unit: str) -> tqdm[None]:
    """A bar that disappears at the end; ``update(n)`` advances it, ``with`` closes it."""
    return tqdm(desc=what, total=total, unit=unit, leave=False, disable=None, dynamic_ncols=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` and the elapsed seconds until the block ends."""
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
        return
    with tqdm(bar_format="{desc}: {elapsed}", desc=what, leave=False) as line:
        done = threading.Event()

        def tick() -> None:
            while not done.wait(1.0):
                line.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()
