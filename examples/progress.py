"""Progress on stderr for whatever takes more than a few seconds; stdout keeps the results.

Work that can be counted gets a bar. A compilation has no known length: its line shows the seconds
so far. Where stderr is no terminal, a compilation leaves one plain line and a bar nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["counting", "working"]


def counting(what: str, total: int, unit: str) -> tqdm[None]:
    """A bar that goes away when it ends; ``update(n)`` moves it, ``with`` closes it."""
    return tqdm(desc=what, total=total, unit=unit, leave=False, disable=None, dynamic_ncols=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that ``what`` goes on, with the seconds so far, until the block ends."""
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
