"""Dynamo's reasons for graph breaks, for the refusals of calls that are several graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from dartfx.passes.refusal import ONE_GRAPH, SDPA_ADVICE, Declined

__all__ = ["GraphBreak", "broken_by", "with_graph_break"]


@dataclass(frozen=True)
class GraphBreak:
    """Dynamo's explanation of a graph break, and the user's line that caused it."""

    because: str
    where: str

    @classmethod
    def of(cls, error: Exception) -> GraphBreak:
        """Read from the error of a compilation with ``fullgraph=True``."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
        label = "Explanation:"
        said = [line.removeprefix(label).strip() for line in lines if line.startswith(label)]
        because = next(filter(None, said), lines[0] if lines else type(error).__name__)
        files = [at for at, line in enumerate(lines) if line.startswith("File ")]
        return cls(because.rstrip("."), " ".join(lines[files[-1] : files[-1] + 2]) if files else "")


_current: ContextVar[GraphBreak | None] = ContextVar("dartfx_graph_break", default=None)


@contextmanager
def broken_by(graph_break: GraphBreak | None) -> Iterator[None]:
    """Record the reason why calls inside the ``with`` block are several graphs."""
    token = _current.set(graph_break)
    try:
        yield
    finally:
        _current.reset(token)


_GENERATE = "model.generate in place of a plain call: it computes image features before the graph"

# In names of files where attention counts and removes padding on the host in every layer.
_FLASH = "flash_attention"


def with_graph_break(declined: Declined) -> Declined:
    """Adapt the refusal of a graph or call of a model compiled by :func:`dartfx.compile`.

    Adds why the call is not one graph, and removes advice to compile as is already done.
    """
    found = _current.get()
    instead = _GENERATE if found is None else f"what breaks the graph taken out; or {_GENERATE}"
    if found is not None and _FLASH in found.where:
        instead = SDPA_ADVICE
    declined = replace(declined, advice=declined.advice.replace(ONE_GRAPH, instead))
    if found is None:
        return declined
    because = f"{declined.because}; the call is not one graph, because: {found.because}"
    return replace(declined, because=because, where=declined.where or found.where)
