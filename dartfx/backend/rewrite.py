"""The rewriting of one graph, for every caller: trace -> observe -> prune -> outcome.

One policy for exceptions: a Refusal becomes its Declined value, anything else the refusal of an
internal error.  Were one to escape, dynamo would take some kinds for a graph break of the model's
and go on unpruned without a word.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch.fx import GraphModule

from dartfx.config.options import DartConfig
from dartfx.errors import PruningWarning, UnsupportedGraphError
from dartfx.observe.next_step import next_step_of
from dartfx.passes.internal_error import internal_error
from dartfx.passes.outcome import Outcome, Pruned, ReturnsMask
from dartfx.passes.pipeline import FindVision, prune
from dartfx.passes.refusal import Declined
from dartfx.passes.request import Request
from dartfx.passes.runner import Observer
from dartfx.passes.transform.restore_checkpoints import restore_checkpoints
from dartfx.passes.transform.return_mask import return_vision_mask

__all__ = ["Rewritten", "refuse", "rewrite"]

log = logging.getLogger(__name__)

Agree = Callable[[Outcome | None], Outcome | None]


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
    vision: FindVision | None = None,
    observe: Observer | None = None,
    returns_mask: bool = False,
    agree: Agree | None = None,
) -> Rewritten:
    """Prune what ``trace`` makes of the graph ``original``, which is not modified.

    vision: as in :func:`dartfx.passes.pipeline.prune`; returns_mask: where vision tokens are only
    merged here, let the graph return their mask for a later one; agree: what becomes of the graph
    on all ranks of a tensor-parallel model, given what would on this one.
    """
    rewritten = _rewrite(trace, original, request, vision, observe, returns_mask)
    return rewritten if agree is None else rewritten._replace(outcome=agree(rewritten.outcome))


def _rewrite(
    trace: Callable[[], GraphModule],
    original: GraphModule,
    request: Request,
    vision: FindVision | None,
    observe: Observer | None,
    returns_mask: bool,
) -> Rewritten:
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
    merges = ReturnsMask("merges vision tokens and returns their mask for a later graph")
    return Rewritten(merges, module, embeds)


def refuse(config: DartConfig, declined: Declined) -> None:
    """Report that something stays unpruned, as ``on_unsupported`` says.

    Raises UnsupportedGraphError when that is "error".
    """
    if config.on_unsupported == "error":
        raise UnsupportedGraphError(
            because=declined.because, where=declined.where, advice=declined.advice
        )
    if config.on_unsupported == "warn":
        # Python shows a warning once per text, so once per reason.
        shown = dataclasses.replace(declined, advice="")
        text = f"dartfx left a graph unpruned: {shown}; {next_step_of(declined)}"
        warnings.warn(text, PruningWarning, stacklevel=2)
    log.info("not pruned: %s", declined)
