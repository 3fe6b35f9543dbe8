"""Attention in one decoder layer: its keys, its mask, and what feeds it.  Read-only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dartfx.passes.graph import argument, aten, is_one, packet, same_size, sizes, tensor
from dartfx.passes.op_sets import (
    FACTORS,
    SCORE_ELEMENTWISE,
    SCORE_MASKING,
    SCORE_PRODUCTS,
    SCORE_SCALING,
    SCORE_VIEWS,
    SDPA,
    SOFTMAX,
    SWAPPED_DIMS,
)
from dartfx.passes.refusal import Refusal
from dartfx.passes.site import Stack

# An addend that masks a key: e^-1000 underflows to zero in every dtype.
HIDING = -1e3


@dataclass(frozen=True)
class Mask:
    """What an attention masks its scores with, [*, *, Q, K] or None.

    hides: True marks keys to hide (``masked_fill``), not keys to see.
    """

    node: Node | None = None
    hides: bool = False


@dataclass(frozen=True)
class Queries:
    """Post-RoPE queries [B, Hq, S, Dh] as they meet the keys.

    scale: what the layer multiplies their products with the keys by, before its mask.
    """

    node: Node
    scale: float


@dataclass(frozen=True)
class _Scores:
    """The parts of a softmax of scores: ``softmax(mask(product * scale))``.

    scale: None where it is not a number of the graph.
    """

    product: Node
    mask: Mask
    scale: float | None


def is_attention(node: Node) -> bool:
    """Whether the node weighs values by a softmax of products: fused, or the softmax itself."""
    if packet(node) in SOFTMAX:
        return _product_above(argument(node, "self")) is not None
    return packet(node) in SDPA


def _product_above(node: Node, depth: int = 8) -> Node | None:
    """The matrix product that a value is an elementwise function of."""
    if packet(node) in SCORE_PRODUCTS:
        return node
    if depth and packet(node) in SCORE_VIEWS:
        return _product_above(argument(node, "self"), depth - 1)
    if depth == 0 or not _is_elementwise(node):
        return None
    shape = sizes(node)
    for operand in node.all_input_nodes:
        # A product of the scores' own shape; a mask broadcasts, or comes from no product.
        if tensor(operand) is not None and len(sizes(operand)) == len(shape):
            product = _product_above(operand, depth - 1)
            if product is not None:
                return product
    return None


def _is_elementwise(node: Node) -> bool:
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or packet(node) in SCORE_ELEMENTWISE


def attends_causally(stack: Stack) -> bool:
    """Whether the first layer masks its attention, as a decoder's prefill does."""
    for node in stack.nodes(0):
        if packet(node) in SDPA:
            return bool(argument(node, "is_causal")) or argument(node, "attn_mask") is not None
        if packet(node) in SOFTMAX and is_attention(node):
            return _eager_attention(node).mask.node is not None
    return False


def keys_and_mask(core: Node) -> tuple[Node, Mask]:
    """Post-RoPE keys [B, H, S, Dh] of one attention operation and the mask it attends with."""
    if packet(core) in SDPA:
        keys, mask = argument(core, "key"), Mask(argument(core, "attn_mask"))
    else:
        scores = _eager_attention(core)
        keys, mask = _keys(scores.product), scores.mask
        _require_whole_weights(core)
    keys = _unrepeated(keys)
    if len(sizes(keys)) != 4:
        raise Refusal("attention keys are not [B, H, S, Dh]", core)
    return keys, mask


def queries_of(core: Node) -> Queries:
    """The queries of one attention operation.  Raises Refusal where they cannot be identified."""
    if packet(core) in SDPA:
        node, scale = argument(core, "query"), argument(core, "scale")
        scale = sizes(node)[-1] ** -0.5 if scale is None else scale
    else:
        scores = _eager_attention(core)
        node, scale = _queries(scores.product), scores.scale
    if not isinstance(scale, int | float):
        raise Refusal(
            "the scale of attention scores is no number of the graph, so the selector cannot be "
            "given queries",
            core,
            advice="a selector that takes no queries",
        )
    if len(sizes(node)) != 4:
        raise Refusal("attention queries are not [B, Hq, S, Dh]", core)
    return Queries(node, float(scale))


def core_of(stack: Stack, index: int) -> Node:
    """The single attention operation of a layer."""
    cores = _cores(stack, index)
    if len(cores) != 1:
        later = range(index + 1, stack.layers - 1)
        fitting = [f"layer={i + 1}" for i in later if len(_cores(stack, i)) == 1]
        raise Refusal(
            f"layer {index} of {stack.path} holds {len(cores)} attention operations, expected one",
            cores[0] if cores else None,
            advice=f"{(fitting or ['another layer'])[0]}: the one before the cut must be "
            "self-attention",
        )
    return cores[0]


def _cores(stack: Stack, index: int) -> list[Node]:
    return [n for n in stack.nodes(index) if is_attention(n)]


def _eager_attention(softmax: Node) -> _Scores:
    """The parts of ``softmax(mask(q @ k.T * scale))``."""
    node, mask = argument(softmax, "self"), Mask()
    scale: float | None = 1.0
    while packet(node) not in SCORE_PRODUCTS:
        operands = [n for n in node.all_input_nodes if tensor(n) is not None]
        scores = next(n for n in operands if _product_above(n) is not None)
        scale = _scaled(scale, node)
        for other in operands:
            if other is scores or all(map(is_one, sizes(other))):
                continue
            unknown = packet(node) not in SCORE_MASKING or argument(node, "alpha", 1) != 1
            if mask.node is not None or unknown or _product_above(other) is not None:
                raise Refusal(
                    "attention scores are combined with a tensor that is not a recognised mask",
                    node,
                )
            if not _fills_with_a_score(node):
                mask = Mask(other, hides=_hides(node, scores))
        node = scores
    return _Scores(node, mask, scale)


def _scaled(scale: float | None, node: Node) -> float | None:
    """``scale`` times what this call multiplies scores by; None where that is a tensor."""
    if scale is None or packet(node) not in SCORE_SCALING:
        return scale
    factors = [a for a in node.args if isinstance(a, int | float)]
    if len(factors) != 1:
        return None
    return scale / factors[0] if packet(node) in (aten.div, aten.div_) else scale * factors[0]


def _fills_with_a_score(node: Node) -> bool:
    """Whether a masking call replaces scores by a number that still gives a weight."""
    fills = (argument(node, name) for name in ("value", "self", "other"))
    return any(isinstance(f, int | float) and f > HIDING for f in fills)


def _require_whole_weights(weights: Node) -> None:
    """Raise Refusal where keys are hidden after the softmax: then no mask shows which."""
    for user in weights.users:
        if packet(user) in {*SCORE_VIEWS, aten.to, aten._to_copy, aten.dropout}:
            _require_whole_weights(user)
        elif _is_elementwise(user):
            others = [n for n in user.all_input_nodes if n is not weights and tensor(n) is not None]
            if not all(is_one(sizes(n)[-1]) for n in others if sizes(n)):
                raise Refusal(
                    "attention weights are combined with a tensor that may hide keys", user
                )


def _queries(product: Node) -> Node:
    """The queries [B, Hq, S, Dh] of a query-key product."""
    if packet(product) is aten.einsum:
        found = argument(product, "tensors")[0] if _einsum_keys(product) is not None else None
    else:
        found = argument(product, "self")
    queries = found if found is None or len(sizes(found)) == 4 else through(found, SCORE_VIEWS)
    if queries is None or found is None or not _ends_alike(queries, found):
        raise Refusal(
            "the queries of the query-key product are not [B, Hq, S, Dh]",
            product,
            advice="a selector that takes no queries",
        )
    return queries


def _keys(product: Node) -> Node:
    """The keys [B, H, S, Dh] of a query-key product."""
    if packet(product) is aten.einsum:
        found = _einsum_keys(product)
    else:
        transposed = through(argument(product, FACTORS[packet(product)][1]), SCORE_VIEWS)
        found = argument(transposed, "self") if _swaps_last(transposed) else None
    keys = found if found is None or len(sizes(found)) == 4 else through(found, SCORE_VIEWS)
    if keys is None or found is None or not _ends_alike(keys, found):
        raise Refusal(
            "the keys of the query-key product are not a transposed [B, H, S, Dh]", product
        )
    return keys


def _ends_alike(one: Node, other: Node) -> bool:
    """Whether the last two dims of [B, H, S, Dh] are those of a view of it."""
    return all(map(same_size, sizes(one)[2:], sizes(other)[-2:]))


def _einsum_keys(product: Node) -> Node | None:
    """The second operand of ``...qd,...kd->...qk``."""
    operands, letters = argument(product, "tensors"), argument(product, "equation").replace(" ", "")
    inputs, _, result = letters.partition("->")
    queries, _, keys = inputs.partition(",")
    if len(operands) != 2 or not result or "." in letters:
        return None
    fits = keys[-2:] == result[-1] + queries[-1] and keys[:-2] == queries[:-2] == result[:-2]
    return operands[1] if fits else None


def _hides(node: Node, scores: Node) -> bool:
    """Whether True in this masking call's mask takes a score away."""
    if packet(node) is aten.where:
        return argument(node, "other") is scores
    return packet(node) in (aten.masked_fill, aten.masked_fill_)


def _swaps_last(node: Node) -> bool:
    """Whether a value is another one with its last two dims swapped."""
    rank = len(sizes(node))
    if packet(node) in (aten.transpose, aten.swapaxes, aten.mT):
        names: tuple[str, ...] = SWAPPED_DIMS[packet(node)]
        return {argument(node, n) % rank for n in names} in ({rank - 2, rank - 1}, set())
    if packet(node) is aten.permute:
        order = [d % rank for d in argument(node, "dims")]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _unrepeated(keys: Node) -> Node:
    """Grouped-query keys before their heads were repeated: the ranking is the same, and cheaper."""
    expanded = through(keys, SCORE_VIEWS)
    if packet(expanded) is not aten.expand:
        return keys
    grouped = through(argument(expanded, "self"), {aten.slice})
    if packet(grouped) is not aten.unsqueeze:
        return keys
    source: Node = argument(grouped, "self")
    return source if len(sizes(source)) == 4 else keys


def through(node: Node, kinds: Collection[Any]) -> Node:
    """The value before any of these operators; a slice only when it takes all there is."""
    while packet(node) in kinds:
        source = argument(node, "self")
        if packet(node) is aten.slice and not all(map(same_size, sizes(source), sizes(node))):
            break
        node = source
    return node
