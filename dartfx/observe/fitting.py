"""What a graph asks of its integer and bool inputs: who reads them, and which masks must fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dartfx.passes.graph import argument, aten, depends_on_data, hint, packet, sizes, tensor

__all__ = ["Demand", "Reading", "demands", "is_integral", "reading", "sized"]

# Calls whose result holds its first operand's integers, in another form or some of them.
_SAME = {
    aten.view, aten.reshape, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice, aten.select,
    aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.transpose, aten.permute, aten.detach,
    aten.alias, aten.flatten, aten.t, aten.constant_pad_nd, aten.pad, aten.masked_fill, aten.where,
    aten.expand_as, aten.repeat, aten.clamp, aten.clamp_min, aten.cat, aten.unflatten, aten.roll,
}  # fmt: skip
# Calls that read integers as places along a dim: names of the integers and of what they point into.
_INDEXED = {aten.index_select, aten.gather, aten.index_copy, aten.index_copy_, aten.scatter}
_COMPARED = {aten.eq, aten.ne}
_SCATTERED = {aten.masked_scatter, aten.masked_scatter_}
_PUT = {aten.index_put, aten.index_put_}


@dataclass
class Reading:
    """How an integer input is read.

    rows: it points into a table of so many.  places: it counts along a dim of so many.  compared:
    numbers it is held against.  as_mask: it says yes or no.
    """

    rows: int | None = None
    places: int | None = None
    compared: list[int] = field(default_factory=list)
    as_mask: bool = False


@dataclass(frozen=True)
class Demand:
    """A mask that must mark so many positions: one per row of what is written there.

    dims: of what is written to, the rows' own included.  repeated: how often the mask says the
    same of one position, along the rows' own dim.  source:
    the input that it is made of, and the number that marks a position there (None: a mask itself);
    None where no input was found.
    """

    mask: Node
    rows: int
    dims: int
    repeated: int
    source: tuple[Node, int | None] | None


def is_integral(value: Tensor | None) -> bool:
    """Whether a tensor holds integers or bools."""
    return value is not None and not (value.is_floating_point() or value.is_complex())


def sized(shape: Any) -> tuple[int, ...]:
    """A shape at the traced example."""
    return tuple(hint(s) for s in shape)


def reading(node: Node) -> Reading:
    """What reads an integer input, through calls that keep its integers."""
    found, ahead, seen = Reading(), [node], {node}
    while ahead:
        value = ahead.pop()
        for user in value.users:
            _note(found, user, value)
            kept = packet(user) in _SAME and is_integral(tensor(user))
            if kept and user not in seen and tensor(user).dtype != torch.bool:  # type: ignore[union-attr]
                seen.add(user)
                ahead.append(user)
    return found


def _note(found: Reading, user: Node, value: Node) -> None:
    kind, made = packet(user), tensor(user)
    if kind is aten.embedding and argument(user, "indices") is value:
        found.rows = _least(found.rows, argument(user, "weight"), 0)
    elif kind in (aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd):
        if argument(user, "target") is value:
            found.rows = _least(found.rows, argument(user, "self"), 1)
    elif kind in _INDEXED and argument(user, "index") is value:
        found.places = _least(found.places, argument(user, "self"), argument(user, "dim"))
    elif kind in (aten.index, *_PUT):
        dims = [d for d, index in enumerate(argument(user, "indices")) if index is value]
        for dim in dims:
            found.places = _least(found.places, argument(user, "self"), dim)
    elif kind in _COMPARED and isinstance(number := _number(user, value), int):
        found.compared.append(number)
        found.as_mask |= number == 0
    elif made is not None and made.dtype == torch.bool and kind in (*_SAME, aten.logical_not):
        found.as_mask = True


def _least(old: int | None, table: Node, dim: int) -> int | None:
    """The smaller of a bound and a table's size along a dim, where that is known."""
    value = tensor(table)
    if value is None or depends_on_data(value.shape[dim]):
        return old
    size = hint(value.shape[dim])
    return size if old is None else min(old, size)


def _number(user: Node, value: Node) -> Any:
    """What a comparison holds the value against: a number, or a constant of one element."""
    other = argument(user, "other")
    if other is value:
        other = argument(user, "self")
    while isinstance(other, Node) and other.op == "call_function" and other.all_input_nodes:
        other = other.all_input_nodes[0]  # a constant lifted into the graph
    if isinstance(other, Node) and other.op == "get_attr":
        held = other.graph.owning_module.get_buffer(str(other.target))  # type: ignore[union-attr]
        return held.item() if held.numel() == 1 else None
    return other


def demands(module: GraphModule) -> Iterator[Demand]:
    """The masks into which rows of known number are written."""
    for node in module.graph.nodes:
        kind = packet(node)
        if kind in _SCATTERED:
            mask, source = argument(node, "mask"), argument(node, "source")
        elif kind in _PUT:
            indices = [i for i in argument(node, "indices") if i is not None]
            mask, source = indices[0] if len(indices) == 1 else None, argument(node, "values")
        else:
            continue
        into, held, chosen = tensor(node), tensor(source), tensor(mask)
        if into is None or held is None or chosen is None or chosen.dtype != torch.bool:
            continue
        if held.numel() == 1 or any(map(depends_on_data, held.shape)):
            continue  # one value for all places, or as many rows as the mask asks for
        width = hint(into.shape[-1]) if into.ndim > 1 else 1
        whole = chosen.ndim == into.ndim > 1 and hint(chosen.shape[-1]) == width
        rows = prod(sized(held.shape)) // max(width, 1)
        yield Demand(mask, rows, into.ndim, width if whole else 1, _source(mask))


def _source(mask: Node) -> tuple[Node, int | None] | None:
    """The first input that a mask is made of by a comparison, or that is a mask itself."""
    ahead, seen = [mask], {mask}
    while ahead:
        node = ahead.pop(0)
        if packet(node) is aten.eq:
            for operand in node.all_input_nodes:
                start = _origin(operand)
                number = _number(node, operand)
                if start is not None and isinstance(number, int):
                    return start, number
        if node.op == "placeholder":
            return (node, None) if sizes(node) else None
        new = [n for n in node.all_input_nodes if n not in seen and is_integral(tensor(n))]
        seen.update(new)
        ahead += new
    return None


def _origin(node: Node) -> Node | None:
    """The input whose integers a value holds."""
    while node.op != "placeholder":
        if packet(node) not in _SAME or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node if is_integral(tensor(node)) else None
