"""Per-call budgets that differ from the one that the graphs were compiled for.

The number enters a graph as the size of an empty input, so the compiler treats it as a symbol like
any other length, and one graph serves all numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartfx import compat
from dartfx.errors import SelectionError
from dartfx.passes.graph import Size
from dartfx.selection.quotas import FrameLengths, frames_by

__all__ = ["BudgetDispatcher", "CallBudget", "active", "applied", "not_honoured", "requested_for"]

Compiled = Callable[..., Any]

# A share is an integer number of these parts, so that it can be a size.
_PARTS = 10_000


@dataclass(frozen=True)
class CallBudget:
    """kind: "tokens", where ``number`` is R, or "share", in 1/10,000 of the vision tokens."""

    kind: str
    number: int

    @classmethod
    def of_ratio(cls, reduction_ratio: float) -> CallBudget | None:
        """The budget that drops this share; None if it has more than four decimals."""
        parts = round((1 - reduction_ratio) * _PARTS)
        return cls("share", parts) if round(1 - parts / _PARTS, 12) == reduction_ratio else None

    def retain(self, tokens: Size, number: Size) -> Size:
        """R for ``tokens`` vision tokens and a number of this kind; both may be symbolic."""
        if self.kind == "tokens":
            return number
        nearest = (2 * tokens * number + _PARTS) // (2 * _PARTS)
        retained: Size = torch.sym_max(1, nearest)  # type: ignore[no-untyped-call]
        return retained

    @property
    def example(self) -> int:
        """The example number used to rewrite a graph: 0 and 1 would not be symbolic."""
        return max(self.number, 2)

    def as_input(self, args: tuple[Any, ...]) -> Tensor:
        """The graph input whose size is the number, on the device of the others."""
        device = next((a.device for a in args if isinstance(a, Tensor)), None)
        size = torch.empty((self.number, 0), device=device)
        if (mark := compat.find("maybe_mark_dynamic")) is not None:
            mark(size, 0)
        return size


_requested: ContextVar[Mapping[int, CallBudget]] = ContextVar("dartfx_budgets", default={})  # noqa: B039
_active: ContextVar[CallBudget | None] = ContextVar("dartfx_budget", default=None)


def not_honoured(because: str | None) -> SelectionError:
    """The error for a graph that cannot take its budget as an input."""
    because = because or "no vision tokens enter a decoder in it"
    return SelectionError(
        f"dartfx.budget cannot change how many vision tokens a graph keeps: {because}; give "
        "retain_tokens or reduction_ratio to dartfx.compile, and call outside of dartfx.budget"
    )


@contextmanager
def requested_for(model: object, budget: CallBudget) -> Iterator[None]:
    """Set the number of vision tokens that calls of ``model`` in this context keep."""
    token = _requested.set({**_requested.get(), id(model): budget})
    try:
        yield
    finally:
        _requested.reset(token)


@contextmanager
def applied(model: object, lengths: FrameLengths) -> Iterator[None]:
    """Run graphs of ``model`` with the budget requested for it, if any.

    lengths: frame lengths of this call, for budgets per frame.
    """
    token = _active.set(_requested.get().get(id(model)))
    try:
        with frames_by(lengths):
            yield
    finally:
        _active.reset(token)


def active() -> CallBudget | None:
    """The running call's budget; None if it is the options'."""
    return _active.get()


class BudgetDispatcher:
    """Runs the graph with the options' budget, or the one that takes the call's budget.

    build: makes the latter, which takes :meth:`CallBudget.as_input` before the other inputs.
    """

    def __init__(self, fixed: Compiled, build: Callable[[CallBudget], Compiled]) -> None:
        self._fixed, self._build = fixed, build
        self._varying: dict[str, Compiled] = {}
        self._lock = threading.RLock()

    def __call__(self, *args: Any) -> Any:
        budget = active()
        if budget is None:
            return self._fixed(*args)
        with self._lock:
            if budget.kind not in self._varying:
                self._varying[budget.kind] = self._build(budget)
        return self._varying[budget.kind](budget.as_input(args), *args)
