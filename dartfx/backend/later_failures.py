"""Code that fails on the shorter sequence behind a pruned graph: which errors these are.

Dynamo traces what follows a graph break (a loss in a compiled function that calls the model, say)
without calling a backend, so its errors do not mention dartfx.  They get a note that does.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence

import torch

from dartfx import compat
from dartfx.compat import Unavailable
from dartfx.errors import DartfxError
from dartfx.observe import report
from dartfx.observe.report import Report
from dartfx.passes.outcome import Pruned
from dartfx.runtime.kept_positions import PositionsAfterCut

__all__ = ["cut_that_caused", "note_on_errors"]

log = logging.getLogger(__name__)


def cut_that_caused(error: BaseException, reports: Sequence[Report]) -> Pruned | None:
    """The pruned graph whose shorter sequence code behind it failed on, the latest first.

    torch says so in errors about shapes and indices, which name the length S' that it met, or a
    number of rows made of it.  Anything else (no memory, a hook's own bug) is the caller's.
    """
    pruned = [made.outcome for made in reversed(reports) if isinstance(made.outcome, Pruned)]
    if isinstance(error, PositionsAfterCut):
        return pruned[0] if pruned else None
    if isinstance(error, DartfxError | torch.OutOfMemoryError):
        return None
    if not isinstance(error, RuntimeError | ValueError | IndexError):
        return None
    named = {int(number) for number in re.findall(r"\d+", str(error))}
    for outcome in pruned:
        length = outcome.sequence[1]
        if named & {rows * n for rows in (1, outcome.batch) for n in (length, length - 1)}:
            return outcome
    return None


def note_on_errors() -> None:
    """Make dynamo's errors mention the shorter sequence, until torch.compiler.reset()."""
    try:
        callbacks = compat.callback_handler.end_callbacks
    except (Unavailable, AttributeError) as error:
        log.info("errors of code behind a pruned graph come without a note: %s", error)
        return
    if _note not in callbacks:
        callbacks.append(_note)


def _note(*_: object) -> None:
    # Dynamo calls this in a ``finally``; an error raised here would replace the user's.
    error = sys.exception()
    if error is None or (pruned := cut_that_caused(error, report.reports())) is None:
        return
    before, after = pruned.sequence
    error.add_note(
        f"dartfx kept {after} of the prompt's {before} tokens in this model's outputs, and the "
        "code after it failed on the shorter sequence, or may have. Take labels and positions of "
        "those tokens, which dartfx.kept_positions(output) gives: after dartfx.compile(model), or "
        'with the option "tokens" of torch.compile(backend="dart").'
    )
