"""Find where to cut: vision tokens, decoder stack, hidden states, keys and final norm.  Read-only.

Anchors are module paths and operators.  Node names change with the call's arguments, so no name
is ever looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch.fx import Graph, Node

from dartfx.passes.analysis.attention import core_of, is_attention, keys_and_mask, through
from dartfx.passes.analysis.final_norm import final_norm
from dartfx.passes.graph import (
    Size,
    argument,
    aten,
    downstream,
    is_one,
    is_state,
    module_paths,
    only_of_state,
    packet,
    same_size,
    sizes,
    split_index,
    tensor,
    upstream,
    written_after,
)
from dartfx.passes.op_sets import INDEX_PUT, MASKED_SCATTER, REGROUPS, named
from dartfx.passes.refusal import ONE_GRAPH, SDPA_ADVICE, Refusal
from dartfx.passes.site import Merge, Site, Stack, Vision

_ROW_VIEWS = REGROUPS | named("view_as")


def find_merges(graph: Graph, spread: bool = False) -> list[Merge]:
    """Every masked write of rows into floating embeddings [B, S, D], in graph order.

    Covers ``masked_scatter`` and ``index_put`` with one bool mask, in place or not, into [B, S, D]
    or into its rows [B * S, D].  spread: those that spread rows over zeros (canonicalise.py), which
    are added to embeddings rather than replacing them; omitted otherwise.  One row [D] may be an
    image of one token, but next to other merges it is a marker of images.
    """
    merges: list[Merge] = []
    rest: list[Merge] = []
    for node in graph.nodes:
        kind = packet(node)
        if kind in MASKED_SCATTER:
            mask, features = argument(node, "mask"), argument(node, "source")
        elif kind in INDEX_PUT:
            indices = [i for i in argument(node, "indices") if i is not None]
            mask, features = (indices[0] if len(indices) == 1 else None), argument(node, "values")
        else:
            continue
        value, chosen, rows = tensor(node), tensor(mask), tensor(features)
        if value is None or chosen is None or rows is None or chosen.dtype != torch.bool:
            continue
        whole = rows.ndim >= 1 and not is_one(rows.shape[-1])
        if whole and (rows.ndim == 1 or is_one(rows.shape[-2])):
            # One row for many positions is not a feature: a mask token, pads set to zero.
            whole = not _float_inputs(features) <= _float_inputs(argument(node, "self"))
        if only_of_state(features):
            continue  # a learned prompt
        embeds = _as_embeddings(node)
        onto_zeros = packet(argument(node, "self")) is aten.new_zeros
        if embeds is not None and onto_zeros == spread and (whole or kind in MASKED_SCATTER):
            (merges if rows.ndim > 1 else rest).append(Merge(embeds, mask, features))
    return merges or rest


def _float_inputs(node: Node) -> set[Node]:
    """The floating inputs that a call brings, no parameters, which a value is computed from."""
    inputs = {n for n in upstream([node]) if n.op == "placeholder" and not is_state(n)}
    return {n for n in inputs if (value := tensor(n)) is not None and value.is_floating_point()}


def _as_embeddings(node: Node) -> Node | None:
    """A write's result as [B, S, D]: itself, or the one view of its rows that has three dims."""
    value = tensor(node)
    if value is None or not value.is_floating_point():
        return None
    if value.ndim == 3:
        return node
    views = [u for u in node.users if packet(u) in _ROW_VIEWS and len(sizes(u)) == 3]
    same = len(views) == 1 and same_size(sizes(views[0])[-1], value.shape[-1])
    return views[0] if value.ndim == 2 and same else None


def find_stacks(graph: Graph) -> list[Stack]:
    """Every run of modules ``path.0 .. path.L-1`` that holds attention, in graph order."""
    layer_of: dict[str, dict[Node, int]] = defaultdict(dict)
    for node in graph.nodes:
        for path in module_paths(node):
            indexed = split_index(path)
            if indexed is not None:
                layer_of[indexed[0]][node] = indexed[1]
    stacks: list[Stack] = []
    for path, nodes in layer_of.items():
        found = sorted(set(nodes.values()))
        attends = {i for n, i in nodes.items() if is_attention(n)}
        nested = any(path.startswith((f"{s.path}.", f"{s.path}[")) for s in stacks)
        if len(found) > 1 and found == list(range(len(found))) and attends and not nested:
            stacks.append(Stack(path, len(found), nodes))
    return stacks


def find_vision(graph: Graph, stacks: Sequence[Stack]) -> tuple[Vision, Stack] | None:
    """The merge in this graph that feeds a decoder stack, and that stack; None without one.

    Merges inside the stack (features added between layers) are not the entry of the tokens.
    """
    by_path = {s.path: s for s in stacks}
    # Features may also be added to placeholder embeddings; one of several positions shows where.
    feeding = _feeding(graph, stacks, find_merges(graph)) or {
        path: merges[:1]
        for path, merges in _feeding(graph, stacks, find_merges(graph, spread=True)).items()
    }
    if not feeding:
        for merge in find_merges(graph):
            _refuse_unknown_layers(graph, stacks, merge.node)
        return None
    order = {n: i for i, n in enumerate(graph.nodes)}
    path = min(feeding, key=lambda p: order[by_path[p].nodes(0)[0]])
    merges = feeding[path]
    last = merges[-1]
    for merge in merges:
        if written_after(merge.node, merge.mask):
            raise Refusal("the vision mask is written to after the merge", merge.mask)
    for merge in merges[:-1]:
        if last.node not in downstream(graph, [merge.node]):
            raise Refusal("two merges feed the decoder side by side", merge.node)
    vision = Vision(
        embeds=last.node,
        masks=tuple(m.mask for m in merges),
        features=tuple(m.features for m in merges),
        how="merge in the graph",
    )
    return vision, by_path[path]


def _feeding(
    graph: Graph, stacks: Sequence[Stack], merges: Sequence[Merge]
) -> dict[str, list[Merge]]:
    """The merges by the path of the first stack that each enters at its first layer."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    feeding: dict[str, list[Merge]] = defaultdict(list)
    for merge in merges:
        reached = set(downstream(graph, [merge.node]))
        entered = [
            (min(order[n] for n in first), s.path)
            for s in stacks
            if merge.node not in s.layer_of and (first := reached.intersection(s.nodes(0)))
        ]
        if entered:
            feeding[min(entered)[1]].append(merge)
    return feeding


def _refuse_unknown_layers(graph: Graph, stacks: Sequence[Stack], embeds: Node) -> None:
    """Raise Refusal where vision tokens enter a run of modules that hold no attention we know.

    Returning their mask would be in vain: the decoder is here.
    """
    known = {s.path for s in stacks}
    runs: dict[str, dict[int, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in downstream(graph, [embeds]):
        for container, index in filter(None, map(split_index, module_paths(node))):
            runs[container][index].append(node)
    for path, layers in runs.items():
        if len(layers) > 1 and not any(path.startswith(k) for k in known):
            opaque = next(filter(_is_opaque_attention, chain(*layers.values())), None)
            seen = "" if opaque is None else f"; {opaque.target} is opaque to the passes"
            raise Refusal(
                f"vision tokens enter {path}, whose modules hold no attention that is recognised "
                f"(scaled_dot_product_attention, or a softmax of query-key products){seen}",
                opaque or embeds,
                advice=SDPA_ADVICE,
            )


def _is_opaque_attention(node: Node) -> bool:
    """Whether a call may be attention in a custom operator: of q, k and v."""
    library = getattr(node.target, "namespace", "aten")
    tensors = [n for n in node.all_input_nodes if tensor(n) is not None and len(sizes(n)) > 2]
    return library not in ("aten", "prims", "dartfx") and len(tensors) > 2


def entered_stack(graph: Graph, stacks: Sequence[Stack], embeds: Node) -> Stack:
    """The first decoder stack that these embeddings reach.  Raises Refusal without one."""
    reached = set(downstream(graph, [embeds]))
    for stack in stacks:
        if reached.intersection(stack.nodes(0)):
            return stack
    _refuse_unknown_layers(graph, stacks, embeds)
    raise Refusal(
        "the merged embeddings enter a graph that holds no whole decoder stack "
        "(dynamo compiled the layers one by one, or broke the graph between them)",
        advice=ONE_GRAPH,
    )


def entering_embeddings(graph: Graph, stack: Stack) -> Node:
    """The embeddings [B, S, D] that enter a stack's first layer.  Raises Refusal if unclear."""
    outputs = [
        sizes(n)
        for n in stack.nodes(0)
        if tensor(n) is not None and any(stack.layer_of.get(u) == 1 for u in n.users)
    ]
    found = {
        operand
        for node in stack.nodes(0)
        for operand in node.all_input_nodes
        if operand not in stack.layer_of
        and (value := tensor(operand)) is not None
        and value.ndim == 3
        and value.is_floating_point()
        and any(len(h) == 3 and all(map(same_size, h, value.shape)) for h in outputs)
    }
    if len(found) != 1:
        raise Refusal(f"{len(found)} values may be the embeddings that enter {stack.path}")
    return found.pop()


def locate(layer: int, vision: Vision, stack: Stack) -> Site:
    """The cut before decoder layer ``layer`` of ``stack``.  Raises Refusal with the reason."""
    if layer >= stack.layers:
        raise Refusal(
            f"layer={layer}, but the decoder stack {stack.path} has {stack.layers} layers here",
            advice=f"a layer from 0 to {stack.layers - 1}",
        )
    graph = vision.embeds.graph
    hidden = _entering(graph, stack, layer, vision)
    last = _leaving(stack, stack.layers - 1, vision)
    keys: Node | None
    keys, mask = keys_and_mask(core_of(stack, max(layer - 1, 0)))
    if layer == 0:
        # Its keys do not exist yet; its mask does, before the layer takes all of it with a slice.
        keys, mask = None, replace(mask, node=mask.node and through(mask.node, {aten.slice}))
    norm = final_norm(graph, stack, last)
    return Site(vision, stack, layer, hidden, keys, mask.node, mask.hides, norm, last)


def _entering(graph: Graph, stack: Stack, index: int, vision: Vision) -> Node:
    """The one hidden-state-shaped value that a layer takes from the layer before it.

    What a model adds between two layers (visual features, at every level) is in it.  Layer 0 takes
    the embeddings, as scaled or normalised on their way to it.
    """
    shape = sizes(vision.embeds)
    earlier = stack.nodes(index - 1) if index else [vision.embeds]
    inside, before = set(stack.nodes(index)), set(downstream(graph, earlier))
    found = [
        node
        for node in graph.nodes
        if node in before
        and node not in inside
        and not inside.isdisjoint(node.users)
        and _is_like(node, shape)
        and same_size(sizes(node)[1], shape[1])
    ]
    return _only(found, f"layer {index - 1}" if index else "what enters layer 0", stack, shape)


def _leaving(stack: Stack, index: int, vision: Vision) -> Node:
    """The one hidden-state-shaped value that leaves the last layer: of every token, or of some."""
    shape = sizes(vision.embeds)
    found = [
        node
        for node in stack.nodes(index)
        if _is_like(node, shape)
        and any(u.op != "output" and stack.layer_of.get(u) != index for u in node.users)
    ]
    return _only(found, f"layer {index}", stack, shape)


def _is_like(node: Node, shape: Sequence[Size]) -> bool:
    """Whether a value is [B, any, D] and floating."""
    value = tensor(node)
    if value is None or value.ndim != len(shape) or not value.is_floating_point():
        return False
    return same_size(value.shape[0], shape[0]) and same_size(value.shape[-1], shape[-1])


def _only(found: list[Node], what: str, stack: Stack, shape: Sequence[Size]) -> Node:
    if len(found) != 1:
        names = ", ".join(n.name for n in found) or "none"
        raise Refusal(
            f"{what} of {stack.path} should return one hidden state of shape "
            f"{[str(s) for s in shape]}, found {names}",
            found[0] if found else None,
            advice=ONE_GRAPH,
        )
    return found[0]
