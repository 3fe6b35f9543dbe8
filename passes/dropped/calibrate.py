"""Let each kept key count for the tokens dropped in its favour, by an addend to attention scores.

Before, in a layer behind the cut::

    ... = aten.scaled_dot_product_attention(mul_1, mul_1, transpose_4, None, 0.0, True)

After, with the log of the number of tokens that each kept one stands for::

    nearest_kept_default: i64[1, S] = dartfx.nearest_kept(layer_norm_1, ...)
    log_group_sizes_default: f32[1, S'] = dartfx.log_group_sizes(nearest_kept_default, ...)
    to_dtype: f32[1, 1, 1, S'] = aten.to.dtype(unsqueeze_default_1, f32)
    tril_default: bool[S', S'] = aten.tril(new_ones_default)
    where_scalar_other: f32[1, 1, S', S'] = aten.where.ScalarOther(tril_default, to_dtype, -inf)
    ... = aten.scaled_dot_product_attention(mul_1, mul_1, transpose_4, where_scalar_other, ...)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.kv_caches import CacheLayout, sliding_caches
from dartfx.passes.dropped.merge_dropped import nearest_kept
from dartfx.passes.graph import Emitter, argument, aten, packet, set_argument, sizes, tensor
from dartfx.passes.op_sets import SDPA, SOFTMAX
from dartfx.passes.outcome import OrderMixing
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Request
from dartfx.passes.transform.insert_selection import Selection

_HIDDEN = float("-inf")


def require_calibratable(
    region: CutRegion, layout: CacheLayout, mixing: OrderMixing | None, request: Request
) -> None:
    """Raise Refusal where attention behind the cut, now or in later calls, cannot be calibrated."""
    if not request.gathers_decode_mask:
        raise Refusal(
            "calibrated attention needs a mask in every later call, which a bare torch.compile "
            "does not make",
            advice="dartfx.compile(model, calibrate=True)",
        )
    if layout.caches and layout.layout != "uniform":
        raise Refusal(
            "calibrated attention needs KV caches of one length", advice="kv_layout='auto'"
        )
    if region.continues_cache:
        raise Refusal(
            "vision tokens come on a KV cache that already holds tokens, whose calibration this "
            "graph does not see",
            advice="the whole conversation without past_key_values, or calibrate=False",
        )
    if mixing is not None:
        raise Refusal(f"calibration counts keys, and {mixing}", advice="calibrate=False")
    _require_full_attention(region, layout)


def _require_full_attention(region: CutRegion, layout: CacheLayout) -> None:
    site, calls = region.site, _attentions(region)
    sliding = sliding_caches(site, region.output.all_input_nodes, region.axes)
    if layout.return_whole or any(site.stack.layer_of[n] >= site.layer for n in sliding):
        raise Refusal(
            "the KV cache of a sliding window holds other keys than that of full attention, so "
            "later calls would need another calibrated mask for it",
            advice="a cut behind all sliding-window layers, more tokens, or calibrate=False",
        )
    other = next((n for n in region.nodes if packet(n) in SOFTMAX and _in_layer(n, region)), None)
    if not calls or other is not None:
        raise Refusal(
            "attention behind the cut is not scaled_dot_product_attention, whose mask takes the "
            "calibration",
            other,
            advice='attn_implementation="sdpa"',
        )


def _in_layer(node: Node, region: CutRegion) -> bool:
    return region.site.stack.layer_of.get(node, -1) >= region.site.layer


def _attentions(region: CutRegion) -> list[Node]:
    """The attention calls of the layers behind the cut.  Raises Refusal for one of other keys."""
    calls = [n for n in region.nodes if packet(n) in SDPA and _in_layer(n, region)]
    for call in calls:
        keys = argument(call, "key")
        if region.axes.dims(keys) != (2,) or len(sizes(keys)) != 4:
            raise Refusal("attention keys are not [B, H, S, Dh], one per token", call)
    return calls


def calibrate(region: CutRegion, selection: Selection) -> None:
    """Add the log of each key's group size to the attention scores behind the cut.

    Stands last: shapes are those of the pruned graph.  Raises Refusal under tensor parallelism.
    """
    if selection.across is not None:
        raise Refusal(
            "groups of dropped tokens are not known to be the same on every rank",
            selection.keep_idx,
            advice="calibrate=False under tensor parallelism",
        )
    index = nearest_kept(selection.keep_idx)
    sizes_of = torch.ops.dartfx.log_group_sizes.default
    logs = Emitter(index.next)(sizes_of, index, selection.keep_idx)
    made: dict[tuple[Node | None, bool, torch.dtype], Node] = {}
    for call in _attentions(region):
        value = tensor(argument(call, "query"))
        assert value is not None
        mask, causal = argument(call, "attn_mask"), bool(argument(call, "is_causal"))
        key = mask, causal, value.dtype
        if key not in made:
            made[key] = _mask(Emitter(call), logs, mask, causal, value.dtype)
        set_argument(call, "attn_mask", made[key])
        set_argument(call, "is_causal", False)


def _mask(emit: Emitter, logs: Node, mask: Node | None, causal: bool, dtype: torch.dtype) -> Node:
    """The addend [B, 1 or H, 1 or S', S'] of one call's scores."""
    addend = emit(aten.unsqueeze.default, emit(aten.unsqueeze.default, logs, 1), 1)
    addend = emit(aten.to.dtype, addend, dtype)
    if causal:
        length = emit.size(logs, 1)
        mask = emit(aten.new_ones.default, logs, [length, length], dtype=torch.bool)
        mask = emit(aten.tril.default, mask)
    if mask is None:
        return addend
    value = tensor(mask)
    assert value is not None
    if value.dtype == torch.bool:
        return emit(aten.where.ScalarOther, mask, addend, _HIDDEN)
    return emit(aten.add.Tensor, mask, addend)
