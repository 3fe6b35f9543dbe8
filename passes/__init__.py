"""The compiler: graph to facts, graph to graph.

Nothing here knows ``torch.compile``, user options or Triton.  A graph goes through
:func:`normalise` and :func:`prune`; every step lives in the file named after it.

What is listed in ``__all__`` is a public surface of its own, with a version of its own: ``VERSION``
is (major, minor), where a new name or argument raises minor, and anything that a caller would have
to follow raises major.  Everything else in here may change at any time.
"""

if __name__ != "dartfx.passes":
    # From a checkout's root, plain ``passes`` would be a second copy of every class here.
    raise ImportError(f"import this package as 'dartfx.passes', not {__name__!r}")

from .axes import Axes, TokenAxes
from .check import check as check_shapes
from .check import expected as expected_shapes
from .cutting import Region
from .facts import (
    Crossing,
    Cut,
    Declined,
    Merge,
    Outcome,
    Pruned,
    Refusal,
    Request,
    Site,
    Stack,
    Stage,
    Untouched,
    Vision,
)
from .gather import Gatherer, gather_frontier
from .graph import Emitter, render
from .locate import find_merges, find_stacks, find_vision
from .locate import locate as find_site
from .normalise import example_values, normalise
from .pipeline import prune
from .selection import ByOperator, Evidence, Given, Select
from .shrink import reroute_sizes, shrink

VERSION = (1, 0)

__all__ = [
    "VERSION",
    "Axes",
    "ByOperator",
    "Crossing",
    "Cut",
    "Declined",
    "Emitter",
    "Evidence",
    "Gatherer",
    "Given",
    "Merge",
    "Outcome",
    "Pruned",
    "Refusal",
    "Region",
    "Request",
    "Select",
    "Site",
    "Stack",
    "Stage",
    "TokenAxes",
    "Untouched",
    "Vision",
    "check_shapes",
    "example_values",
    "expected_shapes",
    "find_merges",
    "find_site",
    "find_stacks",
    "find_vision",
    "gather_frontier",
    "normalise",
    "prune",
    "render",
    "reroute_sizes",
    "shrink",
]
