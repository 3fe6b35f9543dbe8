"""The compiler: analyses and rewrites of FX graphs.

Nothing here depends on ``torch.compile``, user options or Triton.  A graph goes through
:func:`normalise` and :func:`prune`; every step lives in the file named after it.

What is listed in ``__all__`` is a public surface with a separate version: ``VERSION`` is (major,
minor), and below 1.0 any change that callers must adapt to raises minor.  Everything else in
here may change at any time.
"""

if __name__ != "dartfx.passes":
    # From a checkout's root, plain ``passes`` would be a second copy of every class here.
    raise ImportError(f"import this package as 'dartfx.passes', not {__name__!r}")

from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.graph import Emitter
from dartfx.passes.outcome import Pruned, Unchanged
from dartfx.passes.pipeline import prune
from dartfx.passes.refusal import Declined, Refusal
from dartfx.passes.request import Request, Stage
from dartfx.passes.selection import ByOperator, Given, SelectionInputs

VERSION = (0, 6)

__all__ = [
    "VERSION",
    "ByOperator",
    "Declined",
    "Emitter",
    "Given",
    "Pruned",
    "Refusal",
    "Request",
    "SelectionInputs",
    "Stage",
    "Unchanged",
    "normalise",
    "prune",
]
