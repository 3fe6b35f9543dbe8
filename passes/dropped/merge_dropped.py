"""Average dropped vision tokens into the kept ones that are most like them, where layer K begins.

Before, with ``index_select_default`` the kept rows of what enters layer K, ``add``::

    index_select_default: f32[1, S', 8] = aten.index_select(add, 1, select_int_1)
    linear_2: f32[1, S, 8] = aten.linear(index_select_default, arg7_1)

After, with the sum and the number of each kept token's group::

    nearest_kept_default: i64[1, S] = dartfx.nearest_kept(layer_norm_1, select_tokens_default, ...)
    scatter_add_default: f32[1, S'] = aten.scatter_add(new_zeros_default, 1, clamp_min_default, ...)
    scatter_add_default_1: f32[1, S', 8] = aten.scatter_add(new_zeros_default_1, ...)
    div_tensor: f32[1, S', 8] = aten.div.Tensor(scatter_add_default_1, unsqueeze_default_2)
    linear_2: f32[1, S, 8] = aten.linear(div_tensor, arg7_1)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.graph import Emitter, argument, aten, tensor
from dartfx.passes.refusal import Refusal
from dartfx.passes.transform.gather_frontier import Gatherer
from dartfx.passes.transform.insert_selection import Selection


def merge_dropped(region: CutRegion, selection: Selection, gather: Gatherer) -> None:
    """Let what enters layer K be the mean of each kept token and of those nearest to it.

    Nearest is the largest cosine of what the selection compares.  Positions, masks and the caches
    of earlier layers stay those of the kept tokens.  Raises Refusal under tensor parallelism, and
    where another operator than dartfx's own selects.
    """
    if selection.across is not None:
        raise Refusal(
            "merging dropped tokens is not known to give every rank the same sums",
            selection.keep_idx,
            advice="merge='none' under tensor parallelism",
        )
    index: Node | None = None
    for key, gathered in list(gather.done.items()):
        if key[0] is region.site.hidden:
            index = index or nearest_kept(selection.keep_idx)
            gather.done[key] = _merged(region.site.hidden, gathered, index)


def nearest_kept(keep_idx: Node) -> Node:
    """For each position the slot of keep_idx that it goes into, -1 for none: int64 [B, S].

    In a graph once.  Raises Refusal where another operator selects.
    """
    target = torch.ops.dartfx.nearest_kept.default
    if (found := next((n for n in keep_idx.users if n.target is target), None)) is not None:
        return found
    select = keep_idx
    while select.target is torch.ops.dartfx.require_rows.default:
        select = argument(select, "x")
    if select.target is not torch.ops.dartfx.select_tokens.default:
        raise Refusal(f"{select.target} does not say what dropped tokens are compared by", select)
    compared, vision_mask = argument(select, "hidden"), argument(select, "vision_mask")
    return Emitter(keep_idx.next)(target, compared, keep_idx, vision_mask)


def _merged(hidden: Node, gathered: Node, index: Node) -> Node:
    """The means [B, S', D] in place of ``gathered``, the kept rows of ``hidden``.

    index: [B, S], as :func:`nearest_kept` gives it.
    """
    emit, value = Emitter(gathered.next), tensor(hidden)
    assert value is not None
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    keep_idx = argument(index, "keep_idx")
    rows, kept, width = emit.size(keep_idx, 0), emit.size(keep_idx, 1), emit.size(hidden, 2)
    nowhere = emit(aten.lt.Scalar, index, 0)
    at = emit(aten.clamp_min.default, index, 0)
    one = emit(aten.to.dtype, emit(aten.logical_not.default, nowhere), wide)
    many = emit(aten.new_zeros.default, one, [rows, kept])
    many = emit(aten.clamp_min.default, emit(aten.scatter_add.default, many, 1, at, one), 1)
    values = hidden if value.dtype == wide else emit(aten.to.dtype, hidden, wide)
    values = emit(aten.masked_fill.Scalar, values, emit(aten.unsqueeze.default, nowhere, 2), 0)
    at = emit(aten.expand.default, emit(aten.unsqueeze.default, at, 2), emit.shape(hidden))
    total = emit(aten.new_zeros.default, values, [rows, kept, width])
    total = emit(aten.scatter_add.default, total, 1, at, values)
    mean = emit(aten.div.Tensor, total, emit(aten.unsqueeze.default, many, 2))
    if value.dtype != wide:
        mean = emit(aten.to.dtype, mean, value.dtype)
    gathered.replace_all_uses_with(mean)
    gathered.graph.erase_node(gathered)
    return mean
