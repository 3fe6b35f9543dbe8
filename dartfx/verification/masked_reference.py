"""The reference for a pruned graph: the original, with the dropped tokens masked.

From the cut on, every attention masks the dropped tokens.  The values of the kept tokens must then
equal those of the pruned graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from dartfx.passes.analysis.attention import is_attention
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.graph import argument, aten, downstream, hint, packet, sizes, tensor
from dartfx.passes.site import Site

__all__ = ["Watched", "hiding", "layer_values", "take", "watched", "watched_tail"]


@dataclass(frozen=True)
class Watched:
    """A value to compare: its name, and where its token axis and its batch are.

    dims: token dims.  flat: dims of batch times tokens.  batch: the batch's dim, if any.  tail: of
    all keys, as many of the last are returned; 0 for what is returned whole.  cuts: those keys have
    passed that many cuts in the pruned graph.
    """

    name: str
    dims: tuple[int, ...]
    flat: tuple[int, ...]
    batch: int | None
    tail: int = 0
    cuts: int = 0


def watched(node: Node, axes: TokenAxes) -> Watched:
    """What the axes say of a node."""
    if tensor(node) is None:
        return Watched(node.name, (), (), None)
    return Watched(node.name, axes.dims(node), axes.flat_dims(node), axes.batch_dim(node))


def watched_tail(node: Node, sites: Sequence[Site], axes: TokenAxes) -> Watched:
    """The keys that a sliding-window cache ``keys[:, :, -window + 1:]`` is the tail of."""
    keys = watched(argument(node, "self"), axes)
    cuts = sum(site.stack.layer_of[node] >= site.layer for site in sites)
    return replace(keys, tail=hint(sizes(node)[2]), cuts=cuts)


def layer_values(site: Site, axes: TokenAxes) -> dict[int, Node]:
    """The hidden state that each decoder layer returns, where one is found."""
    found = {}
    for layer in range(site.stack.layers):
        inside = set(site.stack.nodes(layer))
        leaving = [
            node
            for node in site.stack.nodes(layer)
            if axes.dims(node) == (1,)
            and len(sizes(node)) == 3
            and any(user not in inside for user in node.users)
        ]
        if leaving:
            found[layer] = leaving[-1]
    return found


def hiding(module: GraphModule, sites: Sequence[Site], axes: TokenAxes) -> GraphModule:
    """A copy of a normalised graph, called as ``(*keep_idx, *inputs)``; the original stays.

    sites: the cuts, by layer.  keep_idx: for each of them [B, S'] int64, in the prompt's positions;
    tokens that it leaves out are hidden from its layer on.
    """
    graph = Graph()
    twins: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, twins))
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        keeps = [graph.placeholder(f"keep_idx_{number}") for number in range(len(sites))]
    attending: dict[Node, Node] = {}
    for keep, site in zip(keeps, sites, strict=True):
        with graph.inserting_after(twins[site.hidden]):
            dropped = graph.call_function(_dropped, (keep, twins[site.hidden]))
        # What a later cut leaves out is left out of what the earlier ones kept.
        for node in downstream(module.graph, [u for u in site.hidden.users if u.op != "output"]):
            if node.op == "call_function" and is_attention(node):
                attending[node] = dropped
    for node, dropped in attending.items():
        _hide(twins, node, dropped, axes)
    graph.lint()
    return GraphModule(module, graph)


def _dropped(keep_idx: Tensor, hidden: Tensor) -> Tensor:
    """[B, S] bool: the tokens that are not kept."""
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter(
        1, keep_idx, False
    )


def _hide(twins: dict[Node, Node], node: Node, dropped: Node, axes: TokenAxes) -> None:
    """Let the copy of one attention ignore the dropped keys."""
    fused = packet(node) is aten.scaled_dot_product_attention
    queries: Node = argument(node, "query" if fused else "self")
    keys: Node = argument(node, "key" if fused else "self")
    if not axes.is_token(keys, len(sizes(keys)) - (2 if fused else 1)):
        return  # keys of something else, as of the image in cross-attention
    by_token = axes.is_token(queries, len(sizes(queries)) - 2)
    twin = twins[node]
    with twin.graph.inserting_before(twin):
        blind = twin.graph.call_function(
            _attend if fused else _softmax, (dropped, by_token, *twin.args), dict(twin.kwargs)
        )
    twin.replace_all_uses_with(blind)
    twin.graph.erase_node(twin)


def _pairs(dropped: Tensor, by_token: bool, scores: tuple[int, ...]) -> Tensor:
    """Which (query, key) pairs of scores [..., Q, K] to hide, broadcastable to them.

    A dropped token still sees itself: a row of nothing but hidden keys would be NaN, which no
    weight of zero hides from the others.
    """
    pairs = dropped[:, None, :]
    if by_token:
        pairs = pairs & ~torch.eye(dropped.shape[1], dtype=torch.bool, device=dropped.device)
    if len(scores) == 3:  # heads and batch in one dim
        return pairs.repeat_interleave(scores[0] // dropped.shape[0], 0)
    return pairs.reshape(pairs.shape[0], *[1] * (len(scores) - 3), *pairs.shape[1:])


def _attend(
    dropped: Tensor,
    by_token: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    scores = (*query.shape[:-1], key.shape[-2])
    hide = _pairs(dropped, by_token, scores)
    if is_causal:
        attn_mask = torch.ones(scores[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        mask = ~hide
    elif attn_mask.dtype == torch.bool:
        mask = attn_mask & ~hide
    else:
        mask = torch.where(hide, -torch.inf, attn_mask).to(attn_mask.dtype)
    return scaled_dot_product_attention(query, key, value, mask, dropout_p, **more)


def _softmax(
    dropped: Tensor, by_token: bool, scores: Tensor, dim: int, *more: Any, **options: Any
) -> Tensor:
    hide = _pairs(dropped, by_token, tuple(scores.shape))
    return torch.softmax(scores.masked_fill(hide, -torch.inf), dim, *_dtype(more, options))


def _dtype(more: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.dtype, ...]:
    """``softmax`` takes a dtype, ``_softmax`` whether to go from half to float."""
    dtypes = [d for d in (*more, *options.values()) if isinstance(d, torch.dtype)]
    return tuple(dtypes)


def take(value: Tensor, keep_idx: Tensor, where: Watched, length: int) -> Tensor:
    """A value of all ``length`` tokens at the kept ones.  keep_idx: [B, S'] int64."""
    rows = torch.arange(keep_idx.shape[0], device=keep_idx.device)[:, None] * length
    for dim in where.flat:
        value = value.index_select(dim, (keep_idx + rows).flatten())
    for dim in where.dims:
        if keep_idx.shape[0] == 1:
            value = value.index_select(dim, keep_idx[0])
            continue
        assert where.batch is not None, where.name
        if value.shape[where.batch] == 1:
            value = value.expand(
                *[keep_idx.shape[0] if d == where.batch else -1 for d in range(value.ndim)]
            )
        index = [1] * value.ndim
        index[where.batch], index[dim] = keep_idx.shape
        shape = list(value.shape)
        shape[dim] = keep_idx.shape[1]
        value = value.gather(dim, keep_idx.view(index).expand(shape))
    return value
