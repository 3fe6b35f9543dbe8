"""Numbers with their units, and source lines without the folders of this machine."""

from __future__ import annotations

import time

__all__ = ["flops", "in_bytes", "moment", "seconds", "short"]

_LARGE = [(10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, "")]


def flops(number: float) -> str:
    """Floating-point operations: ``3.36 GFLOP``."""
    return _scaled(number, "FLOP")


def in_bytes(number: float) -> str:
    """Bytes by powers of 1000: ``424 kB``."""
    return _scaled(number, "B")


def seconds(number: float) -> str:
    """A duration: ``1.35 s``, ``82 ms``."""
    return f"{number:.3g} s" if number >= 1 else f"{1000 * number:.3g} ms"


def short(source: str) -> str:
    """A source line without the folders above the installed package."""
    return source.rpartition("site-packages/")[2]


def moment(at: float) -> str:
    """A local time: ``27 Nov 12:31:05``."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(at))


def _scaled(number: float, unit: str) -> str:
    size, prefix = next((s for s in _LARGE if abs(number) >= s[0]), (1, ""))
    return f"{number / size:.{3 if number / size < 999.5 else 4}g} {prefix}{unit}"
