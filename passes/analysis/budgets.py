"""How many vision tokens each cut keeps, from shapes alone.  Read-only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Graph, Node

from dartfx.passes.graph import Emitter, Size, depends_on_data, sizes
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Request, Stage
from dartfx.passes.site import Vision


@dataclass(frozen=True)
class PlannedCut:
    """A cut that drops tokens: N per sample that reach it, and R that it retains."""

    stage: Stage
    vision_tokens: Size
    retain: Size


def rows_of(width: Size, shapes: Sequence[Sequence[Size]]) -> Size:
    """How many rows of ``width`` values tensors of these shapes hold together."""
    return sum(prod(shape) // width for shape in shapes)


def vision_tokens(vision: Vision) -> Size:
    """N per sample: feature rows over batch size.  Raises Refusal where it depends on data."""
    batch, _, width = sizes(vision.embeds)
    rows = rows_of(width, [sizes(f) for f in vision.features])
    if vision.row_count is not None:
        rows = rows + sizes(vision.row_count)[0]
    tokens = rows // batch
    if depends_on_data(tokens):
        raise Refusal(
            "the number of vision tokens is not known before this graph runs",
            vision.features[0] if vision.features else vision.embeds,
            advice="model.generate, which computes image features outside the decoder's graph, or "
            "torch.compile without fullgraph",
            may_retry_with_graph_breaks=True,
        )
    return tokens


def given_number(stage: Stage, graph: Graph) -> list[Node]:
    """The placeholder whose first size a stage's ``retain`` takes as well, if it does."""
    if stage.given is None:
        return []
    return [[n for n in graph.nodes if n.op == "placeholder"][stage.given]]


def retained(stage: Stage, tokens: Size, graph: Graph) -> Size:
    """R of a stage."""
    return stage.retain(tokens, *(sizes(n)[0] for n in given_number(stage, graph)))


def arguments(emit: Emitter, stage: Stage, tokens: int | Node) -> tuple[Any, ...]:
    """A stage's ``retain`` and what it takes, as graph arguments."""
    return stage.retain, tokens, *(emit.size(n, 0) for n in given_number(stage, emit.graph))


def plan_budgets(tokens: Size, request: Request, graph: Graph) -> list[PlannedCut]:
    """The cuts that drop tokens: of ``tokens`` per sample, or of those that the cut before retains.

    On symbolic sizes whether a cut drops anything installs a guard, because the graph differs.
    """
    planned, remaining = [], tokens
    for stage in request.stages:
        retain = retained(stage, tokens, graph)
        if request.always or not bool(retain >= remaining):
            planned.append(PlannedCut(stage, remaining, retain))
            remaining = retain
    return planned
