"""The templates of all pages, with escaping."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dartfx.observe.units import flops, in_bytes, moment, seconds, short

__all__ = ["render"]


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
