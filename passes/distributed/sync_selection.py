"""Under tensor parallelism: make every rank select the tokens that one process would.

The selection reads hidden states, masks and keys.  The graph must show that the first two are
the same on every rank; keys are mostly split by heads, and what the selection reads of them is
combined by one collective in front of it.

Before, with keys ``transpose`` of this rank's two heads::

    select_tokens: i64[1, 5] = dartfx.select_tokens(hidden_1, transpose, vision_1, ...)
    return select_tokens

After, for a selector that reads key norms and whose result is compared between the ranks::

    sum_dim_int_list: f32[1, 1, 7, 1] = aten.sum.dim_IntList(abs_default, [1, 3], True, dtype=f32)
    all_reduce_default: f32[1, 1, 7, 1] = _c10d_functional.all_reduce(sum_dim_int_list, ...)
    wait_tensor_default: f32[1, 1, 7, 1] = _c10d_functional.wait_tensor(all_reduce_default)
    select_tokens: i64[1, 5] = dartfx.select_tokens(hidden_1, wait_tensor_default, vision_1, ...)
    hash_indices_default: i64[1] = dartfx.hash_indices(select_tokens)
    all_gather_into_tensor_default: i64[2] = ...
    eq_tensor: bool[2] = aten.eq.Tensor(wait_tensor_default_1, slice_tensor)
    require_rows_default: i64[1, 5] = dartfx.require_rows(select_tokens, eq_tensor, ...)
    return require_rows_default
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx.passes.distributed.rank_placement import RankPlacement, RankPlacements, Replicate, Shard
from dartfx.passes.graph import Emitter, argument, aten, sizes, tensor
from dartfx.passes.outcome import Across
from dartfx.passes.refusal import Refusal
from dartfx.passes.selection import ByOperator, Select

_c10d = torch.ops._c10d_functional
_HEADS, _TOKENS, _CHANNELS = 1, 2, 3

_UNLIKE = (
    "rank {row} of process group GROUP selected other tokens than rank 0. Give every rank the same "
    "inputs; a selector that draws random numbers needs one seed on all ranks (torch.manual_seed)"
)


def sync_selection(keep: Node, select: Select) -> tuple[Node, Across | None]:
    """Make the selection behind ``keep`` one over all ranks, in place.

    keep: keep_idx [B, S'], right after ``select`` emitted it.  Returns what to gather by instead,
    and what was done; ``keep`` itself and None in a graph of one process.  Raises Refusal where the
    graph does not show that the ranks select alike.
    """
    placements = RankPlacements(keep.graph)
    if not placements.group:
        return keep, None
    chosen = _chosen(keep)
    emit = Emitter(chosen)
    norms_only = isinstance(select, ByOperator) and select.reads == "norms"
    how = []
    for operand in [n for n in chosen.all_input_nodes if tensor(n) is not None]:
        placement = placements.of(operand)
        if isinstance(placement, Shard) and len(sizes(operand)) == 4:
            _require_split_by_heads(operand, placement)
            if norms_only:
                whole = _norms_as_keys(emit, operand, placements.group)
            else:
                whole = _all_heads(emit, operand, placements)
            chosen.replace_input_with(operand, whole)
            how.append("key norms summed" if norms_only else "heads gathered")
        else:
            _require_same(operand, placement)
    proof = placements.proof(chosen)
    if isinstance(select, ByOperator) and select.checks_ranks:
        keep = _checked(keep, placements)
    exchange = " and ".join(how) or "keys are the same on every rank"
    return keep, Across(placements.group, placements.ranks, exchange, proof)


def _chosen(keep: Node) -> Node:
    """The selection itself, before the checks that may follow it."""
    while keep.target is torch.ops.dartfx.require_rows.default:
        keep = argument(keep, "x")
    return keep


def _require_same(node: Node, placement: RankPlacement) -> None:
    if placement is not Replicate:
        shape = [str(s) for s in sizes(node)]
        raise Refusal(
            f"the selection reads a value of shape {shape} that the graph does not show to be the "
            "same on every rank, so they might keep different tokens",
            node if isinstance(placement, Shard) else placement.node,
            advice='transformers\' own tp_plan (tp_plan="auto"), without sequence parallelism',
        )


def _require_split_by_heads(node: Node, placement: Shard) -> None:
    if placement.dim != _HEADS:
        raise Refusal(
            "the keys before the cut differ between ranks, and not by their heads alone",
            node,
            advice="a tp_plan that splits key projections by heads, or not at all",
        )


def _norms_as_keys(emit: Emitter, keys: Node, group: str) -> Node:
    """Keys [B, 1, S, 1] whose L1 norms are those of all ranks' keys together.

    Summed in float32, float64 for float64 keys, as the selection itself does.
    """
    value = tensor(keys)
    assert value is not None
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    magnitude = emit(aten.abs.default, keys)
    norms = emit(aten.sum.dim_IntList, magnitude, [_HEADS, _CHANNELS], True, dtype=dtype)
    total = emit(_c10d.all_reduce.default, norms, "sum", group)
    return emit(_c10d.wait_tensor.default, total)


def _all_heads(emit: Emitter, local: Node, placements: RankPlacements) -> Node:
    """[B, H, S, Dh] of all ranks' heads, in the order of the ranks."""
    batch, heads, tokens, channels = (emit.size(local, d) for d in range(4))
    packed = emit(aten.contiguous.default, local)
    gathered = emit(
        _c10d.all_gather_into_tensor.default, packed, placements.ranks, placements.group
    )
    gathered = emit(_c10d.wait_tensor.default, gathered)
    by_rank = emit(aten.view.default, gathered, [placements.ranks, batch, heads, tokens, channels])
    by_row = emit(aten.permute.default, by_rank, [1, 0, 2, 3, 4])
    return emit(aten.reshape.default, by_row, [batch, -1, tokens, channels])


def _checked(keep: Node, placements: RankPlacements) -> Node:
    """``keep`` after a check that all ranks selected the same."""
    emit = Emitter(keep.next)
    mine = emit(torch.ops.dartfx.hash_indices.default, keep)
    of_all = emit(_c10d.all_gather_into_tensor.default, mine, placements.ranks, placements.group)
    of_all = emit(_c10d.wait_tensor.default, of_all)
    alike = emit(aten.eq.Tensor, of_all, emit(aten.slice.Tensor, of_all, 0, 0, 1))
    message = _UNLIKE.replace("GROUP", repr(placements.group))
    return emit(torch.ops.dartfx.require_rows.default, keep, alike, message)
