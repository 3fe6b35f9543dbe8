"""The rewriting of one graph, for every caller: trace -> observe -> prune -> outcome.

One policy for exceptions: a Refusal becomes its Declined value, anything else the refusal of an
internal error.  Were one to escape, dynamo would take some kinds for a graph break of the model's
and go on unpruned without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.fx import GraphModule

from dartfx.passes.internal_error import internal_error
from dartfx.passes.outcome import Outcome, Pruned, ReturnsMask
from dartfx.passes.pipeline import prune
from dartfx.passes.request import Request
from dartfx.passes.runner import Observer
from dartfx.passes.site import Vision
from dartfx.passes.transform.restore_checkpoints import restore_checkpoints
from dartfx.passes.transform.return_mask import return_vision_mask

__all__ = ["Rewritten", "rewrite"]


class Rewritten(NamedTuple):
    """outcome: None where no vision tokens enter a decoder; module: the graph when Pruned or
    ReturnsMask, of no use otherwise; embeds: when ReturnsMask, the output that holds the merged
    embeddings."""

    outcome: Outcome | None
    module: GraphModule
    embeds: int | None = None


def rewrite(
    trace: Callable[[], GraphModule],
    original: GraphModule,
    request: Request,
    *,
    vision: Callable[[GraphModule], Vision] | None = None,
    observe: Observer | None = None,
    returns_mask: bool = False,
) -> Rewritten:
    """Prune what ``trace`` makes of the graph ``original``, which is not modified.

    vision: as in :func:`dartfx.passes.pipeline.prune`; returns_mask: where vision tokens are only
    merged here, let the graph return their mask for a later one.
    """
    step, embeds = "normalise", None
    try:
        module = trace()
        if observe is not None:
            observe("normalise", module)
        outcome = prune(module, request, vision, observe)
        if outcome is None and returns_mask:
            step = "return mask"
            embeds = return_vision_mask(module)
        if isinstance(outcome, Pruned) or embeds is not None:
            step = "restore checkpoints"
            restore_checkpoints(module)
    except Exception as error:
        return Rewritten(internal_error(step, error), original)
    if outcome is not None or not returns_mask:
        return Rewritten(outcome, module)
    if embeds is None:
        return Rewritten(None, original)
    merges = ReturnsMask("merges vision tokens and hands their mask on to a later graph")
    return Rewritten(merges, module, embeds)
