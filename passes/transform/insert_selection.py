"""Put the selection node in front of decoder layer K.

Before, where ``add`` enters layer K (B = 1, N feature rows ``arg4_1``)::

    add: f32[1, S, 8] = aten.add.Tensor(masked_scatter, reshape)
    linear_2: f32[1, S, 8] = aten.linear(add, arg7_1)

After, with R = 4 and S' = S - N + min(R, N): N from shapes, the vision mask, the final norm applied
to ``add``, keep_idx, the mask of the tokens that remain, and S' as an argument::

    floordiv: Sym(N) = floordiv(mul_3, 8)
    select_int: bool[1, S] = aten.select.int(unsqueeze, 2, 0)
    layer_norm_1: f32[1, S, 8] = aten.layer_norm(add, [8], arg9_1, arg10_1)
    select_tokens_default: i64[1, S'] = dartfx.select_tokens(layer_norm_1, mul, select_int, ...)
    gather_default: bool[1, S'] = aten.gather(select_int, 1, select_tokens_default)
    sym_size_int_3: Sym(S') = aten.sym_size.int(select_tokens_default, 1)
    linear_2: f32[1, S, 8] = aten.linear(add, arg7_1)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.fx import Node

from dartfx.passes.analysis.budgets import PlannedCut, arguments
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.distributed.sync_selection import sync_selection
from dartfx.passes.graph import Emitter, aten, is_one, sizes
from dartfx.passes.outcome import Across
from dartfx.passes.refusal import Refusal
from dartfx.passes.selection import Select, SelectionInputs
from dartfx.passes.site import Site
from dartfx.passes.tower.scores import tower_attention
from dartfx.passes.transform.selection_inputs import (
    final_normed,
    layer_keys,
    layer_queries,
    valid_mask,
    vision_mask,
    vision_rows,
)


@dataclass(frozen=True)
class Budget:
    """Sizes of the cut as graph arguments: literals, or nodes when symbolic."""

    vision_tokens: int | Node
    retain: int | Node


@dataclass(frozen=True)
class RuntimeChecks:
    """What decode needs checked.  even_rows: every row must hold its share of the vision tokens;
    window: no row may be left with less than so many tokens, None for any number."""

    even_rows: bool
    window: int | None


class Selected(NamedTuple):
    """keep: keep_idx int64 [B, S'].  mask: the vision mask [B, S] that it was selected from."""

    keep: Node
    mask: Node


def emit_budgets(region: CutRegion, cuts: Sequence[PlannedCut]) -> list[Budget]:
    """The sizes of all planned cuts as graph arguments, in front of the first."""
    emit, vision = Emitter(region.anchor()), region.site.vision
    batch = emit.size(vision.embeds, 0)
    tokens = emit.arithmetic(operator.floordiv, vision_rows(emit, vision), batch)
    retained = [emit.arithmetic(*arguments(emit, cut.stage, tokens)) for cut in cuts]
    return [Budget(n, r) for n, r in zip([tokens, *retained], retained, strict=False)]


_PADS_DROPPED = (
    "row {row} of this batch does not hold its share of the batch's vision tokens, so its pads "
    "would no longer be where the decode mask expects them, and decode would hide its text. Give "
    "every row as many vision tokens, run such rows apart, or pass use_cache=False if nothing is "
    "to be decoded"
)
_PADS_IN_WINDOW = (
    "row {row} of this batch has so few tokens left that its sliding-window caches would hold "
    "pads, and decode would attend to them. Run short rows apart, retain more tokens, or pass "
    "use_cache=False if nothing is to be decoded"
)


class Selection(NamedTuple):
    """A selection that every rank shares.

    keep_idx: int64 [B, S']; vision_mask: bool [B, S'] of the tokens that are left; length: S' as an
    argument; across: what ranks exchange for it, None in a graph of one process.
    """

    keep_idx: Node
    vision_mask: Node
    length: int | Node
    across: Across | None


def insert_selection(
    region: CutRegion, select: Select, budget: Budget, checks: RuntimeChecks
) -> Selection:
    """Select tokens in front of the region."""
    emit = Emitter(region.anchor())
    selected, mask = insert(emit, region.site, region.axes, select, budget, checks)
    keep_idx, across = sync_selection(selected, select)
    remaining = Emitter(keep_idx.next)(aten.gather.default, mask, 1, keep_idx)
    return Selection(keep_idx, remaining, emit.size(keep_idx, 1), across)


def insert(
    emit: Emitter,
    site: Site,
    axes: TokenAxes,
    select: Select,
    budget: Budget,
    checks: RuntimeChecks,
) -> Selected:
    """Emit mask, validity, final norm, selection and what the caches need checked at run time."""
    _require_order(site, axes)
    if site.keys is not None and (2,) not in (axes.dims(site.keys), axes.joined_dims(site.keys)):
        raise Refusal(
            f"the keys of layer {site.layer - 1} are not one per token: the cache is static",
            site.keys,
            advice="the default DynamicCache",
        )
    mask = vision_mask(emit, site.vision)
    valid, keys = valid_mask(emit, site, axes), layer_keys(emit, site, axes)
    normed, queries = partial(final_normed, emit, site), partial(layer_queries, emit, site, axes)
    tower = partial(tower_attention, emit, site.vision, axes.axes, mask)
    counts = budget.vision_tokens, budget.retain
    keep = select(emit, SelectionInputs(normed, keys, mask, valid, *counts, queries, tower))
    if checks.even_rows and not is_one(sizes(site.hidden)[0]):
        alike = emit(aten.eq.Scalar, emit(aten.sum.dim_IntList, mask, [1]), budget.vision_tokens)
        keep = emit(torch.ops.dartfx.require_rows.default, keep, alike, _PADS_DROPPED)
    if checks.window is not None and valid is not None:
        valid_left = emit(aten.sum.dim_IntList, emit(aten.gather.default, valid, 1, keep), [1])
        enough = emit(aten.ge.Scalar, valid_left, checks.window)
        keep = emit(torch.ops.dartfx.require_rows.default, keep, enough, _PADS_IN_WINDOW)
    return Selected(keep, mask)


def _require_order(site: Site, axes: TokenAxes) -> None:
    """Raise Refusal unless the cut's rows and tokens are the merge's, in their order.

    Elsewhere on its way the axis may be read in any order (``x + x.flip(1)``).
    """
    embeds, hidden = site.vision.embeds, site.hidden
    if axes.dims(hidden) != (1,):
        raise Refusal("the token axis is not one dim of the hidden states", hidden)
    if not axes.axes.in_order(embeds, hidden):
        raise Refusal(
            "the merged embeddings' rows and tokens do not reach the cut, or in another order",
            embeds,
            advice="merging vision features into embeddings that are in their final order",
        )
