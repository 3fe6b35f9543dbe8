"""A graph's cost: floating-point operations and KV-cache bytes, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch.fx import Node

from dartfx.passes.frontend.causal_windows import CAUSAL_CONV1D
from dartfx.passes.graph import argument, aten, hint, packet, sizes, tensor
from dartfx.passes.op_sets import FACTORS

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, CAUSAL_CONV1D)


def _shape(node: Node) -> list[int]:
    return [hint(s) for s in sizes(node)]


def node_flops(node: Node) -> int:
    """Multiply-adds of one pre-dispatch ATen call, counted as two operations each.

    Matrix products, attention and convolutions; everything else is memory traffic, counted 0.
    Causal attention counts in full, as the paper's formula does.
    """
    if tensor(node) is None or node.op != "call_function":
        return 0
    kind = packet(node)
    if kind is aten.linear:
        return 2 * prod(_shape(node)) * _shape(argument(node, "input"))[-1]
    if kind in FACTORS:
        return 2 * prod(_shape(node)) * _shape(argument(node, FACTORS[kind][0]))[-1]
    if kind is aten.scaled_dot_product_attention:
        query, key = _shape(argument(node, "query")), _shape(argument(node, "key"))
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + _shape(node)[-1])
    if kind in _CONVOLUTIONS:
        return 2 * prod(_shape(node)) * prod(_shape(argument(node, "weight"))[1:])
    return 0


def flops(nodes: Iterable[Node]) -> int:
    """Floating-point operations of some nodes at the traced example's sizes."""
    return sum(map(node_flops, nodes))


def bytes_of(nodes: Iterable[Node]) -> int:
    """Bytes of some tensors at the traced example's sizes."""
    return sum(prod(_shape(n)) * _itemsize(n) for n in nodes)


def _itemsize(node: Node) -> int:
    value = tensor(node)
    assert isinstance(value, torch.Tensor)
    return value.element_size()
