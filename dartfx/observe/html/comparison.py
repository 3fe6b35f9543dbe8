"""The page of ``dartfx diff``."""

from __future__ import annotations

from collections.abc import Sequence

from dartfx.observe.compare import Comparison
from dartfx.observe.html.templating import render

__all__ = ["page"]


def page(comparisons: Sequence[Comparison]) -> str:
    """All comparisons with the first dump, one below the other."""
    return render("comparison.html.jinja", comparisons=comparisons)
