"""The frontier: every token-axis value that enters the region behind the cut is gathered, once.

Before, with hidden states ``add`` and a rotary table ``cos`` from in front of the cut::

    linear_2: f32[1, S, 8] = aten.linear(add, arg7_1)
    mul_1: f32[1, 2, S, 4] = aten.mul.Tensor(transpose_3, unsqueeze_4)
    add_1: f32[1, S, 8] = aten.add.Tensor(add, reshape_1)

After, for one row (a batch gathers each row by its own positions); fake values in the region still
say S, until ``check_shapes``::

    select_int_1: i64[S'] = aten.select.int(select_tokens_default, 0, 0)
    index_select_default: f32[1, S', 8] = aten.index_select(add, 1, select_int_1)
    linear_2: f32[1, S, 8] = aten.linear(index_select_default, arg7_1)
    index_select_default_1: f32[1, S', 4] = aten.index_select(cos, 1, select_int_1)
    unsqueeze_5: f32[1, 1, S', 4] = aten.unsqueeze(index_select_default_1, 1)
    mul_1: f32[1, 2, S, 4] = aten.mul.Tensor(transpose_3, unsqueeze_5)
    add_1: f32[1, S, 8] = aten.add.Tensor(index_select_default, reshape_1)
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Var, factor_length
from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.graph import (
    Emitter,
    argument,
    aten,
    bases,
    expr,
    is_one,
    mutated_operands,
    packet,
    sizes,
    without_gradient,
)
from dartfx.passes.op_sets import REPEATED_VIEWS
from dartfx.passes.refusal import Refusal

State = tuple[Node | None, Node | None]


class Gatherer:
    """Gathers values along their token dims by keep_idx [B, S'], remembering each.

    A value is gathered again after something was written to it, and once more where gradients are
    off: what is gathered there carries none.
    """

    def __init__(self, axes: TokenAxes, keep_idx: Node) -> None:
        self.axes = axes
        self.keep_idx = keep_idx
        self.done: dict[tuple[Node, State], Node] = {}
        self._flat: dict[Node, Node] = {}
        self._joined: dict[tuple[sympy.Expr, ...], Node] = {}
        self._flat_rows: Node | None = None
        nodes = list(keep_idx.graph.nodes)
        self._order = {n: i for i, n in enumerate(nodes)}
        self._writes = [(n, bases(w)[-1]) for n in nodes for w in mutated_operands(n)]
        self._off: dict[Node, Node | None] = {}
        off: Node | None = None
        for node in nodes:
            off = without_gradient(node, off)
            self._off[node] = off

    def __call__(self, value: Node, anchor: Node) -> Node:
        """``value`` with its token dims gathered before ``anchor``; itself when it has none."""
        joined = self.axes.joined_dims(value)
        dims, flat = (*self.axes.dims(value), *joined), self.axes.flat_dims(value)
        if not dims and not flat:
            return value
        key = value, self._state(value, anchor)
        if key not in self.done:
            self.done[key] = self._gathered(value, anchor, dims, flat)
        return self.done[key]

    def crossed(self) -> dict[Node, Node]:
        """Every value that was gathered, and the result; repeated views are omitted."""
        return {v: done for (v, _), done in self.done.items() if packet(done) not in REPEATED_VIEWS}

    def crosses(self, value: Node) -> bool:
        """Whether the value has a token axis, as a dim or as a factor of one."""
        axes = self.axes
        return bool(axes.dims(value) or axes.flat_dims(value) or axes.joined_dims(value))

    def _state(self, value: Node, anchor: Node) -> State:
        """The last write to the value before ``anchor``, and what turned gradients off there."""
        now, base = self._order[anchor], bases(value)[-1]
        written = (n for n, b in reversed(self._writes) if b is base and self._order[n] < now)
        return next(written, None), self._off[anchor]

    def _gathered(
        self, value: Node, anchor: Node, dims: tuple[int, ...], flat: tuple[int, ...]
    ) -> Node:
        emit = Emitter(anchor)
        if flat:
            return self._by_flat_index(emit, value, flat)
        if packet(value) in REPEATED_VIEWS:
            # One table (cos, sin) viewed by every layer: gather the table, repeat the view.
            source = argument(value, "self")
            return emit.copy(value, {source: self(source, anchor)})
        if is_one(sizes(self.keep_idx)[0]):
            return self._by_index(emit, value, dims)
        return self._by_row(emit, value, dims)

    def _by_index(self, emit: Emitter, value: Node, dims: tuple[int, ...]) -> Node:
        """One row: the same positions for the whole tensor."""
        for dim, positions in [(d, self._positions(value, d)) for d in dims]:
            if positions not in self._flat:
                after = Emitter(positions.next)
                self._flat[positions] = after(aten.select.int, positions, 0, 0)
            value = emit(aten.index_select.default, value, dim, self._flat[positions])
        return value

    def _positions(self, value: Node, dim: int) -> Node:
        """Which positions of a dim stay, [B, any]: of a joined one all but the dropped tokens."""
        parts = self.axes.joined(value, dim)
        if not parts:
            return self.keep_idx
        lengths = tuple(expr(factor_length(part)) for part in parts)
        if lengths not in self._joined:
            self._joined[lengths] = self._join(parts)
        return self._joined[lengths]

    def _join(self, parts: tuple[Var, ...]) -> Node:
        # Behind keep_idx, in order: each emission stands before the same node.
        after, axes, found = Emitter(self.keep_idx.next), self.axes, []
        start: int | Node = 0
        for part in parts:
            size = after.size(*axes.axes.earliest(part))
            if axes.is_token_factor(part):
                moved = type(start) is int and start == 0
                found.append(
                    self.keep_idx if moved else after(aten.add.Tensor, self.keep_idx, start)
                )
            else:
                end = after.arithmetic(operator.add, start, size)
                held = after(aten.arange.start, start, end, device=_device(self.keep_idx))
                rows = after.size(self.keep_idx, 0)
                found.append(after(aten.expand.default, held, [rows, size]))
            start = after.arithmetic(operator.add, start, size)
        return after(aten.cat.default, found, 1)

    def _by_flat_index(self, emit: Emitter, value: Node, flat: tuple[int, ...]) -> Node:
        """Batch and tokens in one dim: row b keeps positions b * S + keep_idx[b]."""
        if self._flat_rows is None:
            after = Emitter(self.keep_idx.next)
            rows = after(
                aten.arange.default, after.size(self.keep_idx, 0), device=_device(self.keep_idx)
            )
            starts = after(aten.mul.Tensor, rows, after.size(self.axes.token[0], 1))
            positions = after(
                aten.add.Tensor, self.keep_idx, after(aten.unsqueeze.default, starts, 1)
            )
            self._flat_rows = after(aten.view.default, positions, [-1])
        for dim in flat:
            factors = self.axes.factors(value, dim)
            is_rows = len(factors) == 2 and self.axes.is_batch_factor(factors[0])
            if not is_rows or not self.axes.is_token_factor(factors[1]) or self.axes.dims(value):
                raise Refusal(
                    "a value that flattens tokens together with other dims crosses the cut", value
                )
            value = emit(aten.index_select.default, value, dim, self._flat_rows)
        return value

    def _by_row(self, emit: Emitter, value: Node, dims: tuple[int, ...]) -> Node:
        """Each row its own positions; a value shared by the rows is expanded first."""
        batch = self.axes.batch_dim(value)
        if batch is None:
            raise Refusal("a value with a token axis but no batch dim crosses the cut", value)
        rank, by_dim = len(sizes(value)), [(d, self._positions(value, d)) for d in dims]
        rows = emit.size(self.keep_idx, 0)
        shape = [emit.size(value, d) for d in range(rank)]
        if is_one(sizes(value)[batch]):
            shape[batch] = rows
            value = emit(aten.expand.default, value, list(shape))
        for dim, positions in by_dim:
            index_shape: list[int | Node] = [1] * rank
            index_shape[batch], index_shape[dim] = rows, emit.size(positions, 1)
            shape[dim] = index_shape[dim]
            index = emit(aten.view.default, positions, index_shape)
            index = emit(aten.expand.default, index, list(shape))
            value = _gather(emit, value, dim, index)
        return value


def _gather(emit: Emitter, value: Node, dim: int, index: Node) -> Node:
    dtype = value.meta["val"].dtype
    if not dtype.is_floating_point or dtype.itemsize > 1:
        return emit(aten.gather.default, value, dim, index)
    # Codes of a quantised cache: torch gathers no float8 on a CPU.
    codes = emit(aten.view.dtype, value, torch.uint8)
    return emit(aten.view.dtype, emit(aten.gather.default, codes, dim, index), dtype)


def _device(node: Node) -> torch.device:
    device: torch.device = node.meta["val"].device
    return device


def gather_frontier(region: CutRegion, keep_idx: Node) -> Gatherer:
    """Gather every operand that enters the region from outside it; what was gathered.

    Each gather stands at a use, after any in-place write the value received before.
    Raises Refusal when the region itself writes to a token-axis value from outside.
    """
    gather, inside = Gatherer(region.axes, keep_idx), set(region.nodes)
    for node in region.nodes:
        for written in mutated_operands(node):
            if any(b not in inside and gather.crosses(b) for b in bases(written)):
                raise Refusal(
                    "a decoder layer after the cut writes in place to a value from before it, as "
                    "a static cache's update or `x += y` on the layer's input does",
                    node,
                    advice="the default DynamicCache, or `x = x + y`",
                )
        for operand in node.all_input_nodes:
            if operand not in inside:
                replacement = gather(operand, node)
                if replacement is not operand:
                    node.replace_input_with(operand, replacement)
    return gather
