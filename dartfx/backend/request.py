"""What the backend requests of the passes: options, and what the caller of compiled code can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

import dartfx.ops  # noqa: F401  registers torch.ops.dartfx.select_tokens
from dartfx.config.options import DartConfig
from dartfx.passes.request import Request, Stage
from dartfx.passes.selection import ByOperator
from dartfx.runtime.call_budget import CallBudget
from dartfx.selection.quotas import quota_arguments
from dartfx.selection.registry import is_random, optional_inputs, uses_key_norms_only

__all__ = ["TORCH_COMPILE", "CallerCapabilities", "request_of"]


@dataclass(frozen=True)
class CallerCapabilities:
    """What the caller of compiled code does beyond calling it; ``torch.compile`` does none of it.

    can_retry_with_graph_breaks: compiles the same call in several graphs when NeedsGraphBreaks is
    raised; fixes_sliding_lengths: sets the token counts of sliding-window caches after each call;
    gathers_decode_mask: gathers the decode mask's columns by the keep_idx of a pruned graph;
    knows_positions: reports to its own caller which tokens are kept, and handles PositionsAfterCut;
    replays_prefills: says which of its calls may run as recordings (CUDA graphs).
    """

    can_retry_with_graph_breaks: bool = False
    fixes_sliding_lengths: bool = False
    gathers_decode_mask: bool = False
    knows_positions: bool = False
    replays_prefills: bool = False


TORCH_COMPILE = CallerCapabilities()


def request_of(
    config: DartConfig, caller: CallerCapabilities, budget: CallBudget | None = None
) -> Request:
    """The passes' request for these options and this caller of the compiled code.

    budget: of the kind that the graph's first input gives at run time.
    """
    pivots = config.pivot_image_tokens, config.pivot_text_tokens
    operator = torch.ops.dartfx.select_tokens.default
    select = ByOperator(
        operator,
        (*pivots, config.selector, config.kernel),
        queries="queries" in optional_inputs(config.selector),
        reads="norms" if uses_key_norms_only(config.selector) else "heads",
        checks_ranks=config.check_ranks or is_random(config.selector),
        more=quota_arguments(config.quota, config.min_tokens),
        tower_attention="tower_attention" in optional_inputs(config.selector),
    )
    stages = tuple(
        Stage(layer, partial(config.retain_for, stage=number), select)
        for number, layer in enumerate(config.layers)
    )
    if budget is not None:
        stages = (replace(stages[0], retain=budget.retain, given=0),)
    return Request(
        stages=stages,
        kv_layout=config.kv_layout,
        fixes_sliding_lengths=caller.fixes_sliding_lengths,
        gathers_decode_mask=caller.gathers_decode_mask,
        always=budget is not None,
        order_mixing=config.order_mixing == "allow",
        merge=config.merge == "nearest",
        calibrate=config.calibrate,
    )
