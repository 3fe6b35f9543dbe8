"""An internal error as a refusal that shows where it is and how to report it."""

from __future__ import annotations

import logging
import traceback
from types import TracebackType

from torch.fx import Node

from dartfx import compat
from dartfx.passes.graph import source_line
from dartfx.passes.outcome import Unchanged
from dartfx.passes.refusal import Declined, NoDecoder, Refusal

REPORT_IT = (
    "please report it to dartfx with this message and the graph's dump (option dump=FOLDER or "
    "DARTFX_DUMP=FOLDER); docs/debugging.md, 'Report an internal error'"
)

log = logging.getLogger(__name__)


def internal_error(name: str, error: Exception) -> Declined | Unchanged:
    """An internal error in pass ``name``, as a refusal: called while handling ``error``.

    Were it to escape, dynamo would take some kinds of error for a graph break of the model's and
    go on unpruned without a word.
    """
    if isinstance(error, NoDecoder):
        return Unchanged(error.declined.because)
    if isinstance(error, Refusal):
        return error.declined
    if isinstance(error, compat.Unavailable):
        return Declined(str(error), advice="another version; python -m dartfx doctor lists these")
    log.debug("pass %r failed", name, exc_info=True)
    *_, frame = traceback.extract_tb(error.__traceback__) or [None]
    raised = f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" if frame else ""
    because = f"internal error in pass {name!r}: {describe(error)}"
    node = _node_of(error.__traceback__)
    if node is not None:
        line = source_line(node)
        because += f" (at node {node}, {node.target}" + (f", from {line}" * bool(line)) + ")"
    return Declined(because, where=raised, advice=REPORT_IT)


def describe(error: Exception) -> str:
    """An error's type and text; the line that raised it where it says nothing (``assert x``)."""
    *_, frame = traceback.extract_tb(error.__traceback__) or [None]
    text = str(error).strip() or (frame.line if frame else "") or "no text"
    return f"{type(error).__name__}: {text}"


def _node_of(at: TracebackType | None) -> Node | None:
    """The node that the innermost function which has one was at work on."""
    found = None
    while at is not None:
        nodes = (v for v in at.tb_frame.f_locals.values() if isinstance(v, Node))
        found = at.tb_frame.f_locals.get("node") or next(nodes, found)
        at = at.tb_next
    return found if isinstance(found, Node) else None
