"""What all pages share: templates that escape everything, and numbers with their units."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["flops", "in_bytes", "render"]

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


def _scaled(number: float, unit: str) -> str:
    size, prefix = next((s for s in _LARGE if abs(number) >= s[0]), (1, ""))
    return f"{number / size:.{3 if number / size < 999.5 else 4}g} {prefix}{unit}"


def moment(at: float) -> str:
    """A local time: ``27 Nov 12:31:05``."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(at))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("dartfx.observe.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(flops=flops, bytes=in_bytes, seconds=seconds, moment=moment, short=short)
    return made


def render(template: str, **facts: Any) -> str:
    """A page of ``templates/``; whatever comes from a model or a prompt is escaped."""
    return _environment().get_template(template).render(**facts)
