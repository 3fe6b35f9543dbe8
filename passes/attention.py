"""Attention in one decoder layer: its keys, its mask, and what feeds it.  Read-only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch.fx import Node

from .facts import Refusal, Stack
from .graph import argument, aten, packet, same_size, sizes, tensor

_SDPA = aten.scaled_dot_product_attention
_SOFTMAX = {aten.softmax, aten._softmax, aten._safe_softmax}
_PRODUCTS = {aten.matmul, aten.bmm}
_VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.clone, aten.contiguous}


def is_attention(node: Node) -> bool:
    """Whether the node weighs values by a softmax: fused, or the softmax itself."""
    return packet(node) is _SDPA or packet(node) in _SOFTMAX


def keys_and_mask(stack: Stack, index: int) -> tuple[Node, Node | None]:
    """Post-RoPE keys [B, H, S, Dh] of one layer and the mask it attends with."""
    cores = [n for n in stack.nodes(index) if is_attention(n)]
    if len(cores) != 1:
        raise Refusal(
            f"layer {index} of {stack.path} holds {len(cores)} attention operations, expected one",
            cores[0] if cores else None,
            advice="another layer: the one before the cut must be self-attention",
        )
    core = cores[0]
    if packet(core) is _SDPA:
        keys, mask = argument(core, "key"), argument(core, "attn_mask")
    else:
        keys, mask = _eager_attention(core)
    keys = _unrepeated(keys)
    if len(sizes(keys)) != 4:
        raise Refusal("attention keys are not [B, H, S, Dh]", core)
    return keys, mask


def _eager_attention(softmax: Node) -> tuple[Node, Node | None]:
    """Keys and additive mask of ``softmax(q @ k.T * scale + mask)``."""
    mask: Node | None = None
    node = argument(softmax, "self")
    while packet(node) not in _PRODUCTS:
        operands = [n for n in node.all_input_nodes if tensor(n) is not None]
        scores = [n for n in operands if n in _score_chain(node, operands)]
        if len(scores) != 1:
            raise Refusal("attention scores do not lead back to one query-key product", softmax)
        others = [n for n in operands if n is not scores[0] and len(sizes(n)) == 4]
        if packet(node) is aten.add and others:
            mask = others[0]
        node = scores[0]
    transposed = node.all_input_nodes[1]
    swapped = (argument(transposed, "dim0"), argument(transposed, "dim1"))
    if packet(transposed) is not aten.transpose or {d % 4 for d in swapped} != {2, 3}:
        raise Refusal("the keys of the query-key product are not a transposed [B, H, S, Dh]", node)
    return transposed.all_input_nodes[0], mask


def _score_chain(node: Node, operands: Iterable[Node]) -> list[Node]:
    """Operands of the same shape as ``node`` that come from a product."""
    shape = sizes(node)
    chain = []
    for operand in operands:
        same = len(sizes(operand)) == len(shape) and all(map(same_size, sizes(operand), shape))
        if same and _reaches_product(operand):
            chain.append(operand)
    return chain


def _reaches_product(node: Node, depth: int = 8) -> bool:
    if packet(node) in _PRODUCTS:
        return True
    inputs = [n for n in node.all_input_nodes if tensor(n) is not None]
    return depth > 0 and any(_reaches_product(n, depth - 1) for n in inputs)


def _unrepeated(keys: Node) -> Node:
    """Grouped-query keys before their heads were repeated: the ranking is the same, and cheaper."""
    expanded = _through(keys, _VIEWS)
    if packet(expanded) is not aten.expand:
        return keys
    grouped = _through(expanded.all_input_nodes[0], {aten.slice})
    if packet(grouped) is not aten.unsqueeze:
        return keys
    source = grouped.all_input_nodes[0]
    return source if len(sizes(source)) == 4 else keys


def _through(node: Node, kinds: Collection[Any]) -> Node:
    """The value before any of these operators; a slice only when it takes all there is."""
    while packet(node) in kinds:
        source = node.all_input_nodes[0]
        if packet(node) is aten.slice and not all(map(same_size, sizes(source), sizes(node))):
            break
        node = source
    return node
