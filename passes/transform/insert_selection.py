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

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.fx import Node

from dartfx.passes.analysis.attention import HIDING, queries_of
from dartfx.passes.analysis.budgets import PlannedCut, arguments, rows_of
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.distributed.sync_selection import sync_selection
from dartfx.passes.graph import (
    Emitter,
    aten,
    downstream,
    is_one,
    mutated_operands,
    same_size,
    sizes,
    tensor,
    value_of,
)
from dartfx.passes.outcome import Across
from dartfx.passes.refusal import Refusal
from dartfx.passes.selection import Select, SelectionInputs
from dartfx.passes.site import Site, Vision


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


def vision_rows(emit: Emitter, vision: Vision) -> int | Node:
    """How many vision feature rows enter the embeddings, from shapes alone."""
    if vision.row_count is not None:
        return emit.size(vision.row_count, 0)
    shapes = [emit.shape(features) for features in vision.features]
    return emit.arithmetic(rows_of, emit.size(vision.embeds, 2), shapes)


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
    if site.keys is not None and axes.dims(site.keys) != (2,):
        raise Refusal(
            f"the keys of layer {site.layer - 1} are not one per token of this call: "
            "the cache is static, or already holds earlier tokens",
            site.keys,
            advice="the default DynamicCache and a prompt that starts a new cache",
        )
    mask = vision_mask(emit, site.vision)
    valid = _valid_mask(emit, site, axes)
    normed, queries = partial(_normed, emit, site), partial(_queries, emit, site, axes)
    keep = select(
        emit,
        SelectionInputs(
            normed, _keys(emit, site), mask, valid, budget.vision_tokens, budget.retain, queries
        ),
    )
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


def vision_mask(emit: Emitter, vision: Vision) -> Node:
    """The merges' masks as one bool [B, S].  Raises Refusal for a mask of another form."""
    embeds = vision.embeds
    shape = [emit.size(embeds, 0), emit.size(embeds, 1)]
    united: Node | None = None
    for mask in vision.masks:
        of_rows = len(sizes(mask)) < 3 and not same_size(sizes(mask)[-1], sizes(embeds)[1])
        if of_rows or len(sizes(mask)) == 1:
            mask = _mask_of_rows(emit, mask, shape)
        rank = len(sizes(mask))
        if rank not in (2, 3) or not same_size(sizes(mask)[1], sizes(embeds)[1]):
            raise Refusal("the vision mask is not one bool per position of the sequence", mask)
        if rank == 3:
            mask = emit(aten.select.int, mask, 2, 0)
        if not same_size(sizes(mask)[0], sizes(embeds)[0]):
            mask = emit(aten.expand.default, mask, shape)
        united = mask if united is None else emit(aten.logical_or.default, united, mask)
    assert united is not None
    return united


def _mask_of_rows(emit: Emitter, mask: Node, shape: list[int | Node]) -> Node:
    """[B, S] of a mask over rows: [B * S], or [B * S, 1 or D]."""
    if len(sizes(mask)) == 2:
        mask = emit(aten.select.int, mask, 1, 0)
    batch, tokens = (value_of(s) for s in shape)
    if not same_size(sizes(mask)[0], batch * tokens):
        raise Refusal("the vision mask is not one bool per position of the sequence", mask)
    return emit(aten.view.default, mask, shape)


def _valid_mask(emit: Emitter, site: Site, axes: TokenAxes) -> Node | None:
    """Which positions any query of layer K-1 may see, bool [B, S]; None without a mask."""
    mask = site.attention_mask
    if mask is None:
        return None
    if site.layer == 0 and not mask < emit.anchor:
        raise Refusal(
            "the attention mask of layer 0 is made inside of it, so pads are not known before",
            mask,
            advice="layer=1",
        )
    value = tensor(mask)
    assert value is not None
    by_row = value.ndim == 3 and not is_one(sizes(mask)[0])  # of batch times heads, perhaps
    if not 2 <= value.ndim <= 4 or by_row or value.ndim - 1 not in axes.dims(mask):
        raise Refusal("the attention mask before the cut is not [*, *, Q, S]", mask)
    while len(sizes(mask)) < 4:
        mask = emit(aten.unsqueeze.default, mask, 0)
    if value.dtype != torch.bool:
        mask = emit(aten.gt.Scalar, mask, HIDING)
    elif site.mask_hides:
        mask = emit(aten.logical_not.default, mask)
    seen = emit(aten.any.dim, emit(aten.any.dim, mask, 2), 1)
    if is_one(sizes(seen)[0]) and not is_one(sizes(site.hidden)[0]):
        embeds = site.vision.embeds
        seen = emit(aten.expand.default, seen, [emit.size(embeds, 0), emit.size(embeds, 1)])
    return seen


def _keys(emit: Emitter, site: Site) -> Node:
    """Keys of layer K-1; before layer 0 keys of no heads, whose norms are zero."""
    if site.keys is not None:
        return site.keys
    batch, tokens = emit.size(site.hidden, 0), emit.size(site.hidden, 1)
    return emit(aten.new_empty.default, site.hidden, [batch, 0, tokens, 1])


def _queries(emit: Emitter, site: Site, axes: TokenAxes) -> Node:
    """Queries of layer K-1, so scaled that ``q @ k.T / sqrt(Dh)`` are its scores."""
    if site.layer == 0:
        raise Refusal(
            "no layer before layer 0 has queries, which the selector asks for",
            advice="layer=1 or a later one, or a selector that takes no queries",
        )
    found = queries_of(site.stack, site.layer - 1)
    if axes.dims(found.node) != (2,):
        raise Refusal(
            f"the queries of layer {site.layer - 1} are not one per token of this call",
            found.node,
            advice="a selector that takes no queries",
        )
    factor = found.scale * math.sqrt(sizes(found.node)[-1])
    if math.isclose(factor, 1, rel_tol=1e-6):
        return found.node
    return emit(aten.mul.Tensor, found.node, factor)


def _normed(emit: Emitter, site: Site) -> Node:
    """The model's final norm applied to layer K-1's output: its own nodes, copied.

    Embeddings are what they are: before layer 0, methods compare them without a norm.
    """
    if site.layer == 0:
        return site.hidden
    order = {n: i for i, n in enumerate(emit.graph.nodes)}
    computed = set(downstream(emit.graph, [site.norm_input]))
    hidden = site.hidden
    if any(mutated_operands(n) for n in site.norm if n in computed):
        hidden = emit(aten.clone.default, hidden)  # the norm may write to what it is given
    renamed: dict[Node, Node] = {site.norm_input: hidden}

    def reach(node: Node) -> None:
        if node in renamed or order[node] < order[emit.anchor]:
            return
        for operand in node.all_input_nodes:
            reach(operand)
        if node in computed:
            renamed[node] = emit.copy(node, renamed)
        else:
            # A weight on its way to the norm (``1 + weight``, a scalar input): needed earlier now.
            emit.anchor.prepend(node)
            renamed[node] = node

    for node in site.norm:
        reach(node)
    return renamed[site.norm[-1]]
