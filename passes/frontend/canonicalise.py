"""Rewrites computations to equivalent ones that show what they do token by token.

Each rewrite computes the same values.  It runs on every graph that may be pruned, before any
analysis.  Rows picked by a mask and put back (N depends on data; rows have no token axis)::

    index: f32[N, D] = aten.index.Tensor(x_1, [mask_1])
    add: f32[N, D] = aten.add.Tensor(index, rows_1)
    index_put: f32[1, S, D] = aten.index_put(x_1, [mask_1], add)

become the same work on every token::

    unsqueeze_default: bool[1, S, 1] = aten.unsqueeze(mask_1, 2)
    new_zeros_default: f32[1, S, D] = aten.new_zeros(rows_1, ...)
    masked_scatter_default: f32[1, S, D] = aten.masked_scatter(new_zeros_default, ..., rows_1)
    add_1: f32[1, S, D] = aten.add.Tensor(x_1, masked_scatter_default)
    where_self: f32[1, S, D] = aten.where.self(unsqueeze_default, add_1, x_1)

The inverse of a sort's order, written by index::

    arange: i64[6] = aten.arange(6)
    index_put: i64[6] = aten.index_put(empty_like, [argsort], arange)

becomes::

    argsort_default: i64[6] = aten.argsort(argsort)
"""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

from dartfx.passes.frontend.fix_windows import fold_start
from dartfx.passes.graph import (
    Emitter,
    argument,
    aten,
    is_one,
    is_view,
    packet,
    same_size,
    sizes,
    tensor,
    written_after,
)
from dartfx.passes.op_sets import ASSERTIONS, BROADCASTS, INDEX_PUT, MASKED_SCATTER, ROW_BY_ROW


def canonicalise(graph: Graph) -> None:
    """Apply every rewrite where it matches."""
    for node in list(graph.nodes):
        if packet(node) in INDEX_PUT:
            _inverse_permutation(node)
    for node in list(graph.nodes):
        if packet(node) is aten.index:
            _unpack(node)
        elif packet(node) is aten.slice:
            fold_start(node)


# --- the inverse of a permutation -------------------------------------------------------------


def _inverse_permutation(node: Node) -> None:
    """``inverse[order] = arange(n)`` of a sort's indices is ``argsort(order)``."""
    target, indices, values = (argument(node, n) for n in ("self", "indices", "values"))
    if len(indices) != 1 or argument(node, "accumulate") or not _written_alone(target, node):
        return
    order, written = indices[0], tensor(target)
    if written is None or written.dtype != torch.int64 or written.ndim != 1:
        return
    if not is_sort_order(order) or not _counts_up(values):
        return
    if same_size(*_lengths(values, order)) and same_size(*_lengths(target, order)):
        emit = Emitter(node)
        inverse = emit(aten.argsort.default, order)
        node.replace_all_uses_with(inverse)
        for dead in (node, target, values):
            if not dead.users:
                node.graph.erase_node(dead)


def is_sort_order(node: object) -> bool:
    """Whether a value is the positions, in order, of what a 1-D sort sorted."""
    if not isinstance(node, Node) or tensor(node) is None or len(sizes(node)) != 1:
        return False
    if packet(node) is aten.argsort:
        return True
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return isinstance(source, Node) and packet(source) is aten.sort


def _counts_up(node: Node) -> bool:
    """Whether a value is 0, 1, 2, ..."""
    if packet(node) is not aten.arange:
        return False
    return bool(argument(node, "start", 0) == 0 and argument(node, "step", 1) == 1)


def _lengths(*nodes: Node) -> list[Any]:
    return [sizes(n)[0] for n in nodes]


def _written_alone(target: Node, write: Node) -> bool:
    """Whether nothing else reads what ``write`` writes into ``target``."""
    if target.op != "call_function" or is_view(target):
        return False
    order = {n: i for i, n in enumerate(target.graph.nodes)}
    others = [u for u in target.users if u is not write]
    return all(order[u] < order[write] and not is_view(u) for u in others)


# --- rows picked by a mask, changed and put back ----------------------------------------------


def _unpack(index: Node) -> None:
    """``x[mask] = f(x[mask], rows)`` is ``where(mask, f(x, rows spread over the mask), x)``.

    The packed rows' number depends on data, and shapes do not show which of them belong to a
    dropped token.  Spread out, they have a token axis.
    """
    source, chosen = argument(index, "self"), [i for i in argument(index, "indices") if i]
    value = tensor(chosen[0]) if len(chosen) == 1 and argument(index, "indices")[0] else None
    if value is None or value.dtype != torch.bool or value.ndim != 2 or len(sizes(source)) != 3:
        return
    mask: Node = chosen[0]
    packed = _packed(index)
    writes = [n for n in packed if _write_mask(n, packed) is not None]
    put_back = writes and all(_puts_back(n, mask, packed) for n in writes)
    changes = written_after(index, source, next(reversed(packed))) if put_back else []
    if put_back and set(packed).issuperset(changes):
        _rewrite(index, mask, packed)


def _write_mask(node: Node, packed: Container[Node]) -> Node | None:
    """The mask by which a call writes packed rows somewhere; None for any other call."""
    if packet(node) in INDEX_PUT and argument(node, "values") in packed:
        chosen = [i for i in argument(node, "indices") if i is not None]
        return chosen[0] if len(chosen) == 1 and not argument(node, "accumulate") else None
    if packet(node) in MASKED_SCATTER and argument(node, "source") in packed:
        mask: Node = argument(node, "mask")
        return mask
    return None


def _packed(index: Node) -> dict[Node, None]:
    """Everything computed from the packed rows [P, D] row by row, up to where it is put back.

    Sizes of packed values, and what asserts about them, are among it.  A dict, for its order;
    empty when anything else reads the rows.
    """
    found: dict[Node, None] = {index: None}
    written: set[Node] = set()
    for node in index.graph.nodes:
        if all(i in written or i not in found for i in node.all_input_nodes):
            continue
        if _write_mask(node, found) is not None:
            written.add(node)
        elif not (_row_by_row(node, found) or _flattened(node) or _about_sizes(node)):
            return {}
        found[node] = None
    return found


def _row_by_row(node: Node, packed: Container[Node]) -> bool:
    value = tensor(node)
    by_number = any(i in packed and tensor(i) is None for i in node.all_input_nodes)
    return value is not None and value.ndim == 2 and packet(node) in ROW_BY_ROW and not by_number


def _flattened(node: Node) -> bool:
    """Whether packed rows are laid out as one run of values, as a masked scatter reads them."""
    value = tensor(node)
    flat = value is not None and value.ndim == 1 and packet(node) in (aten.view, aten.reshape)
    return flat and all(packet(u) in MASKED_SCATTER for u in node.users)


def _about_sizes(node: Node) -> bool:
    """Whether a node is a size, computes with sizes, or asserts something of them."""
    is_size = isinstance(node.meta.get("val"), int | torch.SymInt | torch.SymBool | bool)
    return is_size or packet(node) in ASSERTIONS


def _puts_back(node: Node, mask: Node, packed: Container[Node]) -> bool:
    target, used = argument(node, "self"), _write_mask(node, packed)
    functional = packet(node) in (aten.index_put, aten.masked_scatter)
    return (
        used is not None
        and _positions(used) is _positions(mask)
        and target not in packed
        and (functional or _written_alone(target, node))
    )


def _positions(mask: Node) -> Node:
    """The mask itself, whatever dims it was given to broadcast."""
    while packet(mask) in BROADCASTS:
        mask = argument(mask, "self")
    return mask


def _rewrite(index: Node, mask: Node, packed: dict[Node, None]) -> None:
    spread: dict[Node, Node] = {index: argument(index, "self")}
    chosen = Emitter(index)(aten.unsqueeze.default, mask, 2)

    def dense(operand: Node, user: Node) -> Node:
        """[B, S, D] for packed rows [P, D]; anything that broadcasts over rows, as it is."""
        if operand not in spread and tensor(operand) is not None:
            shape = sizes(operand)
            if len(shape) == 2 and not is_one(shape[0]):
                emit = Emitter(user)
                full = [emit.size(mask, 0), emit.size(mask, 1), emit.size(operand, 1)]
                empty = emit(aten.new_zeros.default, operand, full)
                spread[operand] = emit(aten.masked_scatter.default, empty, chosen, operand)
        return spread.get(operand, operand)

    for node in packed:
        if node is index or _about_sizes(node):
            continue
        if _write_mask(node, packed) is not None:
            rows = dense(
                argument(node, "source" if packet(node) in MASKED_SCATTER else "values"), node
            )
            emit = Emitter(node)
            node.replace_all_uses_with(emit(aten.where.self, chosen, rows, argument(node, "self")))
        elif _flattened(node):
            spread[node] = dense(argument(node, "self"), node)
        else:
            spread[node] = Emitter(node).copy(
                node, {i: dense(i, node) for i in node.all_input_nodes}
            )
    for node in reversed(packed):
        index.graph.erase_node(node)
