"""A compiled model's history: its reports and the tokens that it kept last, bounded.

``dartfx.reports()`` and ``dartfx.kept_tokens()`` show those of all models in the process, which are
bounded as well: a server compiles new shapes for as long as it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dartfx.errors import DartfxError
from dartfx.model.target import inner_model
from dartfx.observe import report
from dartfx.observe.report import MOST_REPORTS, Report
from dartfx.runtime import keep_idx
from dartfx.runtime.keep_idx import KeepIdxRecord
from dartfx.token_map.kept_tokens import KeptTokens, tokens_of
from dartfx.token_map.layout import Layout

__all__ = ["History", "kept_tokens", "reports"]


@dataclass
class History:
    """One compiled model's: its latest reports, and the last call's record with kept tokens."""

    reports: deque[Report] = field(default_factory=lambda: deque(maxlen=MOST_REPORTS))
    kept: KeepIdxRecord | None = None

    def add_kept(self, records: Sequence[KeepIdxRecord]) -> None:
        """Remember the last of a call's records that says where vision tokens were, if any."""
        for record in records:
            if record.vision_mask is not None:
                self.kept = record


def reports(model: nn.Module | None = None) -> list[Report]:
    """The last 1000 graphs compiled since the last :func:`dartfx.reset`, oldest first.

    model: only those of this model, which :func:`dartfx.compile` compiled; the last 1000 since
    then.  Raises TypeError for any other.
    """
    return report.reports() if model is None else list(_history(model).reports)


def kept_tokens(
    layouts: Sequence[Layout | Sequence[int]] | Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> list[KeptTokens]:
    """Which vision tokens the last pruned call kept, per image, in prompt order.

    layouts: the call's keyword arguments, if they give the images' sizes; or one layout per image,
    in the order of the images over all rows: a grid (rows, columns) or (frames, rows, columns), or
    a Layout.  They also say where one image ends and the next begins.  Without them every unbroken
    run of vision tokens is an image, and square if its number of tokens is a square.
    model: the last call of this model, which :func:`dartfx.compile` compiled; by default of any.

    Waits for the call's device.  Raises DartfxError when nothing was recorded, TypeError for
    another model, ValueError for layouts of another number of tokens or arguments that do not
    determine them.
    """
    record = keep_idx.last_record() if model is None else _history(model).kept
    if record is None:
        raise DartfxError(
            "no kept tokens were recorded: compile with the option tokens=True and run a call that "
            "is pruned, or use dartfx.explain(..., tokens=True)"
        )
    return tokens_of(record, layouts)


def _history(model: nn.Module) -> History:
    call = getattr(inner_model(model), "_compiled_call_impl", None)
    found = getattr(call, "history", None)
    if not isinstance(found, History):
        raise TypeError(f"{type(model).__name__} was not compiled by dartfx.compile")
    return found
