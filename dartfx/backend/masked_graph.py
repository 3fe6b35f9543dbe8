"""Graphs with more inputs than dynamo's, pruned: a vision mask [B, S] and its rows, a budget."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from dartfx.backend.rewrite import Rewritten, rewrite
from dartfx.passes.analysis import locate
from dartfx.passes.analysis.attention import attends_causally
from dartfx.passes.analysis.token_axes import infer_axes
from dartfx.passes.frontend.normalise import example_values, fresh_size, normalise, with_own_symbols
from dartfx.passes.graph import downstream
from dartfx.passes.refusal import NoDecoder, Refusal
from dartfx.passes.request import Request
from dartfx.passes.runner import Observer
from dartfx.passes.site import Vision
from dartfx.runtime import call_budget
from dartfx.runtime.call_budget import CallBudget
from dartfx.runtime.mask_dispatch import IncomingMask
from dartfx.runtime.rank_agreement import Ranks

__all__ = ["rewrite_with_budget", "rewrite_with_mask"]


def rewrite_with_mask(
    module: GraphModule, ranks: Ranks, observe: Observer, request: Request, incoming: IncomingMask
) -> Rewritten:
    """Prune dynamo's graph ``module`` for calls whose mask comes as ``incoming`` does.

    The empty tensor carries the number of feature rows in its shape.  A request that varies has one
    more in front, which carries the budget.
    """

    budget = call_budget.active() if request.varies else None

    def trace() -> GraphModule:
        examples = with_own_symbols(example_values(ranks.module))
        like, record = examples[ranks.input_index(incoming.like)], incoming.record
        with like.fake_mode as mode:
            mask = torch.empty(like.shape[:2], dtype=torch.bool, device=record.mask.device)
            rows = torch.empty((fresh_size(mode, record.rows), 0), device=record.mask.device)
            given = [torch.empty((fresh_size(mode, budget.example), 0))] if budget else []
        return normalise(ranks.module, examples, extra=(*given, mask, rows))

    def vision(traced: GraphModule) -> Vision:
        embeds = None if incoming.embeds is None else ranks.input_index(incoming.embeds)
        return _entering(incoming._replace(embeds=embeds), traced, behind=int(request.varies))

    return rewrite(trace, module, request, vision=vision, observe=observe, agree=ranks.agree)


def rewrite_with_budget(
    module: GraphModule, ranks: Ranks, observe: Observer, request: Request, budget: CallBudget
) -> Rewritten:
    """Prune a graph that holds the merge, with the budget as an input in front."""

    def trace() -> GraphModule:
        examples = with_own_symbols(example_values(ranks.module))
        mode: Any = next(v.fake_mode for v in examples if hasattr(v, "fake_mode"))
        with mode:
            given = torch.empty((fresh_size(mode, budget.example), 0))
        return normalise(ranks.module, examples, extra=(given,))

    return rewrite(trace, module, request, observe=observe, agree=ranks.agree)


def _entering(incoming: IncomingMask, module: GraphModule, behind: int) -> Vision:
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"][behind:]
    mask, row_count = placeholders[:2]
    stacks = locate.find_stacks(module.graph)
    if incoming.embeds is not None:
        embeds = placeholders[2 + incoming.embeds]
        if (own := locate.find_vision(module.graph, stacks)) is not None:
            return _united(own[0], Vision(embeds, (mask,), (), incoming.record.how, row_count))
    else:
        if not stacks:
            raise NoDecoder("the graph holds no whole decoder stack")
        # A given mask fits any graph of the prompt's shape; a vision tower is no decoder.
        if not attends_causally(stacks[-1]):
            raise NoDecoder(f"{stacks[-1].path} attends without a mask, so it is no decoder")
        embeds = locate.entering_embeddings(module.graph, stacks[-1])
    return Vision(embeds, (mask,), (), incoming.record.how, row_count)


def _united(own: Vision, earlier: Vision) -> Vision:
    """What a graph merges itself, and what an earlier one merged into the same embeddings."""
    graph = own.embeds.graph
    if own.embeds not in downstream(graph, [earlier.embeds]) or not infer_axes(graph).in_order(
        earlier.embeds, own.embeds
    ):
        raise Refusal(
            "tokens that an earlier graph merged do not reach the decoder with those merged here",
            own.embeds,
        )
    masks, how = (*earlier.masks, *own.masks), f"{earlier.how}; {own.how}"
    return Vision(own.embeds, masks, own.features, how, earlier.row_count)
