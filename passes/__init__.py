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

from dartfx.passes.analysis.axes import Axes, TokenAxes
from dartfx.passes.analysis.locate import find_merges, find_stacks, find_vision
from dartfx.passes.analysis.locate import locate as find_site
from dartfx.passes.frontend.normalise import example_values, normalise
from dartfx.passes.graph import Emitter, render
from dartfx.passes.outcome import Crossing, Cut, Outcome, Pruned, Unchanged
from dartfx.passes.pipeline import prune
from dartfx.passes.refusal import Declined, Refusal
from dartfx.passes.request import Request, Stage
from dartfx.passes.selection import ByOperator, Given, Select, SelectionInputs
from dartfx.passes.site import Merge, Site, Stack, Vision
from dartfx.passes.transform.apply_cut import CutRegion
from dartfx.passes.transform.check_shapes import check as check_shapes
from dartfx.passes.transform.check_shapes import expected as expected_shapes
from dartfx.passes.transform.gather_frontier import Gatherer, gather_frontier
from dartfx.passes.transform.shrink_sizes import reroute_sizes, shrink

VERSION = (0, 2)

__all__ = [
    "VERSION",
    "Axes",
    "ByOperator",
    "Crossing",
    "Cut",
    "CutRegion",
    "Declined",
    "Emitter",
    "Gatherer",
    "Given",
    "Merge",
    "Outcome",
    "Pruned",
    "Refusal",
    "Request",
    "Select",
    "SelectionInputs",
    "Site",
    "Stack",
    "Stage",
    "TokenAxes",
    "Unchanged",
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
