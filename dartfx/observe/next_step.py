"""One line of advice when nothing was pruned, at the end of ``explain`` and of warnings."""

from __future__ import annotations

from collections.abc import Sequence

from dartfx.observe.report import Report
from dartfx.passes.outcome import Outcome, Unchanged
from dartfx.passes.refusal import Declined

__all__ = ["next_step", "next_step_of"]

_ANY = (
    'dump the graph with options={"dump": "dumps"}, read dumps/index.html, and see docs/limits.md '
    "for what is refused"
)
_NO_GRAPH = (
    "let dynamo trace the model: no torch.compiler.disable, TORCH_COMPILE_DISABLE=1 or stance "
    "around it; explain the call that you make (model.generate, not a wrapper's)"
)
_NO_VISION = (
    "call the model with an image, by the argument that its processor makes (pixel_values); for "
    "embeddings that you merge yourself, within dartfx.vision_tokens(mask)"
)


def next_step(reports: Sequence[Report]) -> str:
    """What to do about a call of which no graph was pruned."""
    outcomes = [report.outcome for report in reports]
    refused = [o for o in outcomes if isinstance(o, Declined)]
    unsure = [o for o in outcomes if isinstance(o, Unchanged) and (o.all_retained or o.unsure)]
    if refused or unsure:
        return next_step_of((refused or unsure)[0])
    return f"to prune this call: {_NO_VISION if outcomes else _NO_GRAPH}"


def next_step_of(outcome: Outcome) -> str:
    """What to do about one graph that was not pruned."""
    if isinstance(outcome, Declined):
        return f"to prune this call: {outcome.advice or _ANY}"
    if isinstance(outcome, Unchanged) and outcome.all_retained:
        return "to prune this call: a smaller retain_tokens (or a larger reduction_ratio or image)"
    if isinstance(outcome, Unchanged) and outcome.unsure:
        return (
            "to prune this call: dartfx.vision_tokens(mask) around it, or dartfx.compile(model) "
            "where torch.compile was used"
        )
    return f"to prune this call: {_NO_VISION}"
