"""The inputs of a selection, computed in front of the cut, for the tokens of this call only.

A call that continues a KV cache brings the keys and mask columns of earlier tokens as well.  Those
are kept whatever they are, and no pivots: their hidden states are not at hand.  Three of them::

    cat: f32[1, 2, S + 3, 4] = aten.cat([arg5_1, mul], 2)

of which the selection gets the keys behind them::

    sub_1: Sym(3) = sub(sym_size_int_5, sym_size_int_6)
    slice_tensor_1: f32[1, 2, S, 4] = aten.slice.Tensor(cat, 2, sub_1, END)
"""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import Node

from dartfx.passes.analysis.attention import HIDING, core_of, queries_of
from dartfx.passes.analysis.budgets import rows_of
from dartfx.passes.analysis.token_axes import TokenAxes
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
from dartfx.passes.refusal import Refusal
from dartfx.passes.site import Site, Vision

_END = torch.iinfo(torch.int64).max


def vision_rows(emit: Emitter, vision: Vision) -> int | Node:
    """How many vision feature rows enter the embeddings, from shapes alone."""
    noted = 0 if vision.row_count is None else emit.size(vision.row_count, 0)
    if not vision.features:
        return noted
    shapes = [emit.shape(features) for features in vision.features]
    rows = emit.arithmetic(rows_of, emit.size(vision.embeds, 2), shapes)
    return rows if vision.row_count is None else emit.arithmetic(operator.add, noted, rows)


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


def valid_mask(emit: Emitter, site: Site, axes: TokenAxes) -> Node | None:
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
    columns = (*axes.dims(mask), *axes.joined_dims(mask))
    by_row = value.ndim == 3 and not is_one(sizes(mask)[0])  # of batch times heads, perhaps
    if not 2 <= value.ndim <= 4 or by_row or value.ndim - 1 not in columns:
        raise Refusal("the attention mask before the cut is not [*, *, Q, S]", mask)
    mask = _of_this_call(emit, mask, value.ndim - 1, site, axes)
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


def layer_keys(emit: Emitter, site: Site, axes: TokenAxes) -> Node:
    """Keys of layer K-1; before layer 0 keys of no heads, whose norms are zero."""
    if site.keys is not None:
        return _of_this_call(emit, site.keys, 2, site, axes)
    batch, tokens = emit.size(site.hidden, 0), emit.size(site.hidden, 1)
    return emit(aten.new_empty.default, site.hidden, [batch, 0, tokens, 1])


def layer_queries(emit: Emitter, site: Site, axes: TokenAxes) -> Node:
    """Queries of layer K-1, so scaled that ``q @ k.T / sqrt(Dh)`` are its scores."""
    if site.layer == 0:
        raise Refusal(
            "no layer before layer 0 has queries, which the selector requests",
            advice="layer=1 or a later one, or a selector that takes no queries",
        )
    found = queries_of(core_of(site.stack, site.layer - 1))
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


def final_normed(emit: Emitter, site: Site) -> Node:
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


def _of_this_call(emit: Emitter, value: Node, dim: int, site: Site, axes: TokenAxes) -> Node:
    """A value without the tokens that a cache held before, which come first along this dim."""
    parts = axes.joined(value, dim)
    if not parts:
        return value
    if sum(map(axes.is_token_factor, parts)) != 1 or not axes.is_token_factor(parts[-1]):
        raise Refusal("the tokens of this call are not the last ones that layers attend to", value)
    first = emit.arithmetic(operator.sub, emit.size(value, dim), emit.size(site.hidden, 1))
    return emit(aten.slice.Tensor, value, dim, first, _END)
