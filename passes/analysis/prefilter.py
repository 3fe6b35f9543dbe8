"""Cheap pre-filters on Dynamo's graph; avoid re-tracing graphs that cannot be pruned."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from dartfx.passes.graph import module_paths, split_index

# What tells an earlier key from a later one: comparisons of positions with positions, and the like.
_COMPARES = {"ge", "gt", "le", "lt"}
_ORDERED = {"cumsum", "tril", "tril_", "tril_indices", "triu", "triu_", "triu_indices"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm", "__matmul__"}
_MASKS_SCORES = {"add", "iadd", "add_", "masked_fill", "masked_fill_", "to", "float", "where"}
_ROW_WRITES = {"masked_scatter", "masked_scatter_", "index_put", "index_put_", "setitem"}


def may_merge_features(graph: Graph) -> bool:
    """Whether anything here could be a merge of vision features into text embeddings."""
    inputs = (n.meta.get("example_value") for n in graph.nodes if n.op == "placeholder")
    return any(isinstance(i, torch.Tensor) for i in inputs) and any(
        _name(n) in _ROW_WRITES for n in graph.nodes
    )


def has_indexed_layers(graph: Graph) -> bool:
    """Whether a module of an indexed run (``path.0``, ``path.1``) computes here."""
    return any(split_index(p) is not None for n in graph.nodes for p in module_paths(n))


def has_causal_attention(graph: Graph) -> bool:
    """Whether attention here may hide later keys, as a decoder's prefill does.

    A mask that the graph itself makes of pads only, [B, S], hides the same keys from every query:
    a vision tower's.
    """
    for node in graph.nodes:
        if _name(node) == "scaled_dot_product_attention":
            if node.kwargs.get("is_causal") or _may_order(node.kwargs.get("attn_mask")):
                return True
        elif _name(node) == "softmax" and any(map(_may_order, _masks_of_scores(node))):
            return True
    return False


def _masks_of_scores(softmax: Node) -> list[Node]:
    """What is added to scores, or chosen by, on the way to their softmax (eager attention)."""
    masks, scores = list[Node](), softmax.all_input_nodes[:1]
    while scores and _name(scores[0]) in _MASKS_SCORES:
        scores, others = _split_scores(scores[0].all_input_nodes)
        masks += others
    return masks


def _split_scores(nodes: list[Node]) -> tuple[list[Node], list[Node]]:
    """Those that come of a product of queries and keys, by steps over scores, and the others."""
    found = {n: _is_scores(n) for n in nodes}
    return [n for n in nodes if found[n]], [n for n in nodes if not found[n]]


def _is_scores(node: Node) -> bool:
    while _name(node) not in _PRODUCTS:
        if node.op == "placeholder" or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True


def _may_order(mask: Node | None) -> bool:
    """Whether a mask may depend on which of a query and a key comes first."""
    seen, todo = set[Node](), [mask] if mask is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if _tells_order(node):
            return True
        todo += node.all_input_nodes
    return False


def _tells_order(node: Node) -> bool:
    """Whether a value comes from a comparison of positions, or may come from anything."""
    if node.op == "placeholder":
        value = node.meta.get("example_value")
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        return len(shape) > 2 or (len(shape) == 2 and shape[0] == shape[1] != 1)
    if node.op == "get_attr" or type(node.target).__module__ == "torch._ops":  # a custom operator
        return True
    compares = _name(node) in _COMPARES and all(isinstance(arg, Node) for arg in node.args)
    return compares or _name(node) in _ORDERED


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
