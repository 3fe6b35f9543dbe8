"""What a caller requests: where to cut, how much to retain, which KV layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dartfx.passes.graph import Size
from dartfx.passes.selection import Select


@dataclass(frozen=True)
class Stage:
    """One cut.

    layer: K, the first decoder layer that sees the sequence as this cut leaves it;
    retain: N -> R of the tokens that the prompt had, for int and SymInt alike;
    given: the placeholder whose first size is a second argument of retain, None without one;
    select: emits the selection and returns keep_idx int64 [B, S'], see selection.py.
    """

    layer: int
    retain: Callable[..., Size]
    select: Select
    given: int | None = None


@dataclass(frozen=True)
class Request:
    """What the caller wants of the pipeline.

    stages: where to cut, layers ascending, each retaining no more than the one before;
    kv_layout: "auto", "layered" or "uniform";
    fixes_sliding_lengths: the caller sets each sliding cache's token count from its keys;
    gathers_decode_mask: the caller gathers the decode mask's columns by keep_idx;
    order_mixing: whether causal convolutions and scans may run over the kept tokens;
    merge: whether dropped vision tokens are averaged into the kept ones most like them;
    calibrate: whether attention scores of kept keys get the log of their group's size;
    always: rewrite the graph even where R >= N leaves nothing to drop, to check the rewriting.
    """

    stages: tuple[Stage, ...]
    kv_layout: str = "auto"
    fixes_sliding_lengths: bool = False
    gathers_decode_mask: bool = False
    order_mixing: bool = True
    merge: bool = False
    calibrate: bool = False
    always: bool = False

    @property
    def varies(self) -> bool:
        """Whether R is an input of the graph, so that nothing may be decided by its example."""
        return any(stage.given is not None for stage in self.stages)
