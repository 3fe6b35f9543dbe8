"""Declining to prune: a value that a pass returns, and the exception that carries it there."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dartfx.passes.graph import source_line

# Advice for torch.compile's callers; dartfx.compile's have one graph where dynamo can make it.
ONE_GRAPH = (
    "fullgraph=True, dartfx.compile, or model.generate, which computes image features before the "
    "model's graph"
)

SDPA_ADVICE = (
    'attn_implementation="sdpa", or that for the decoder alone (docs/limits.md, flash attention): '
    "the vision tower may keep its own"
)


@dataclass(frozen=True)
class Declined:
    """The graph holds vision tokens but cannot be pruned; nothing was changed.

    ``where`` is the user's own source line of the node that stopped us, or "".
    ``may_retry_with_graph_breaks``: several smaller graphs of the same call may be prunable.
    """

    because: str
    where: str = ""
    advice: str = ""
    may_retry_with_graph_breaks: bool = False

    def __str__(self) -> str:
        parts = [self.because]
        if self.where:
            parts.append(f"at {self.where}")
        if self.advice:
            parts.append(f"try: {self.advice}")
        return "; ".join(parts)


class Refusal(Exception):
    """Carries a :class:`Declined` out of a pass to the pipeline, which returns it as a value."""

    def __init__(
        self,
        because: str,
        node: Node | None = None,
        advice: str = "",
        may_retry_with_graph_breaks: bool = False,
    ) -> None:

        where = source_line(node) if node is not None else ""
        self.declined = Declined(because, where, advice, may_retry_with_graph_breaks)
        super().__init__(str(self.declined))


class NoDecoder(Refusal):
    """Not a decoder's graph: a mask given for a whole call reaches every graph of it."""
