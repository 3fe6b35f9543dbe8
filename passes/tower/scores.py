"""The attention that each vision token gets in the vision tower, computed in front of the cut.

What the tower's own attention computes is fused away, so one row of it (of the class token), or all
rows' mean, is computed once more. Of two images of 17 tokens, whose first is no vision token::

    attention_received: f32[2, 17] = dartfx.attention_received(transpose_5, transpose_6, ...)
    slice_tensor: f32[2, 16] = aten.slice.Tensor(attention_received, 1, 1, END)
    reshape_default: f32[32] = aten.reshape.default(slice_tensor, [-1])
    new_zeros_default: f32[1, S] = aten.new_zeros.default(reshape_default, [1, S])
    masked_scatter_default: f32[1, S] = aten.masked_scatter.default(new_zeros_default, mask, ...)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import Emitter, aten
from dartfx.passes.site import Vision
from dartfx.passes.tower.find import find_tower

_END = torch.iinfo(torch.int64).max


def tower_attention(emit: Emitter, vision: Vision, axes: Axes, mask: Node) -> Node:
    """Each vision token's share, in the order that its features are merged: [B, S], 0 elsewhere.

    mask: the vision mask, bool [B, S].  Raises Refusal where the graph does not show it.
    """
    found = find_tower(vision, axes)
    shares = emit(
        torch.ops.dartfx.attention_received.default,
        *(found.queries, found.keys, found.scale, found.dropped == 1),
    )
    if found.dropped:
        shares = emit(aten.slice.Tensor, shares, 1, found.dropped, _END)
    rows = emit(aten.reshape.default, shares, [-1])
    nowhere = emit(aten.new_zeros.default, rows, emit.shape(mask))
    return emit(aten.masked_scatter.default, nowhere, mask, rows)
