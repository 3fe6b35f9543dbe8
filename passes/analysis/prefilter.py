"""Cheap pre-filters on Dynamo's graph; avoid re-tracing graphs that cannot be pruned."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from dartfx.passes.graph import module_paths, split_index

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


def has_masked_attention(graph: Graph) -> bool:
    """Whether fused attention here hides some keys, as a decoder's prefill does."""
    return any(
        _name(n) == "scaled_dot_product_attention"
        and (n.kwargs.get("is_causal") or n.kwargs.get("attn_mask") is not None)
        for n in graph.nodes
    )


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
