"""Find the attention of the vision tower that vision features come from.  Read-only.

No module path is looked at: it is the last attention in front of the features, and what lies
between the two must keep tokens one to one, in order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property, partial

from torch.fx import Graph, Node

from dartfx.passes.analysis.attention import is_attention, keys_and_mask, queries_of
from dartfx.passes.analysis.axis_classes import Axes, Var
from dartfx.passes.graph import (
    argument,
    aten,
    downstream,
    is_one,
    packet,
    same_size,
    sizes,
    tensor,
    upstream,
)
from dartfx.passes.op_sets import REGROUPS, SDPA, named
from dartfx.passes.refusal import Refusal
from dartfx.passes.site import Vision

ADVICE = (
    "a selector that needs no attention of the vision tower (docs/selectors.md, attention of the "
    "tower)"
)
_CAT, _FLATTEN = named("cat", "concat"), REGROUPS | named("flatten")


@dataclass(frozen=True)
class TowerAttention:
    """The tower's self-attention that features come from.

    queries: [I, Hq, P, Dh] of I images; keys: [I, H, P, Dh]; scale: of their products; dropped: how
    many of the P tokens, the first ones, are no vision tokens: 0, or 1 for a class token.
    """

    queries: Node
    keys: Node
    scale: float
    dropped: int


def find_tower(vision: Vision, axes: Axes) -> TowerAttention:
    """The attention whose tokens become vision tokens.  Raises Refusal without such a one."""
    if len(vision.features) != 1 or vision.row_count is not None:
        count = len(vision.features)
        what = "features computed before it" if count < 2 else f"features of {count} merges"
        raise Refusal(
            f"the selector needs the vision tower's attention, and this graph merges {what}",
            vision.embeds,
            advice=ADVICE,
        )
    (features,) = vision.features
    above = upstream([features])
    cores = [n for n in features.graph.nodes if n in above and is_attention(n)]
    if not cores:
        raise Refusal(
            "the selector needs the vision tower's attention, and no attention in this graph "
            "computes the features that it merges",
            features,
            advice=ADVICE,
        )
    core = cores[-1]
    (keys, mask), queries = keys_and_mask(core), queries_of(core)
    causal = packet(core) in SDPA and argument(core, "is_causal")
    if mask.node is not None or causal:
        raise Refusal("the attention of the vision tower is masked", core, advice=ADVICE)
    if len(sizes(core)) != 4 or not axes.same((queries.node, 2), (keys, 2)):
        raise Refusal(
            "the attention that vision features come from is not among the tokens of an image",
            core,
            advice=ADVICE,
        )
    dropped = _Way(features.graph, core, features, axes).dropped()
    if dropped > 1:
        raise Refusal(
            f"vision features leave out {dropped} first tokens of an image, and which of them is "
            "the class token does not show",
            features,
            advice=ADVICE,
        )
    return TowerAttention(queries.node, keys, queries.scale, dropped)


class _Way:
    """What lies between an attention and the features that are merged."""

    def __init__(self, graph: Graph, core: Node, features: Node, axes: Axes) -> None:
        above = upstream([features])
        self._nodes = [n for n in downstream(graph, [core]) if n in above]
        self._core, self._features, self._axes = core, features, axes

    def dropped(self) -> int:
        """How many first tokens of each image are left out.  Raises Refusal for any other change.

        Rows of features are the tokens of image after image.
        """
        grid = self._grid()
        alone = is_one(sizes(self._core)[0]) and is_one(sizes(grid)[0])
        if not (alone or self._reaches((self._core, 0), (grid, 0))):
            raise self._refusal((self._core, 0))
        for first, start in self._starts.items():
            if self._reaches(start, (grid, 1)):
                return first
        raise self._refusal(*self._starts.values())

    @cached_property
    def _starts(self) -> dict[int, Var]:
        """The attention's token axis, by how many first tokens were left out of it."""
        start = (self._core, 2)
        starts = {0: start}
        for node in self._nodes:
            if first := _leaves_out(node):
                dim = argument(node, "dim", 0) % len(sizes(node))
                if self._reaches(start, (argument(node, "self"), dim)):
                    starts[first] = (node, dim)
        return starts

    def _grid(self) -> Node:
        """The value [I, P, D] whose tokens, image after image, are the rows of features."""
        if len(sizes(self._features)) == 3:
            return self._features
        rows = [
            node
            for node in self._nodes
            if tensor(node) is not None
            and len(sizes(node)) == 2
            and self._reaches((node, 0), (self._features, 0))
        ]
        first = rows[0] if rows else self._features
        source = argument(first, "self") if packet(first) in _FLATTEN else _images_of(first)
        if source is None or len(sizes(source)) != 3 or not _alike(source, first):
            raise _changes_tokens(first)
        return source

    def _reaches(self, start: Var, end: Var) -> bool:
        """Whether one dim's positions are those of the other, in order."""
        return start == end or (self._axes.same(start, end) and self._axes.flows_to(start, end))

    def _refusal(self, *starts: Var) -> Refusal:
        """Names the first call behind which an axis of the attention is none any more."""
        losing = filter(partial(self._loses, starts), self._nodes)
        return _changes_tokens(next(losing, self._features))

    def _loses(self, starts: tuple[Var, ...], node: Node) -> bool:
        if _leaves_out(node) or tensor(node) is None:
            return False
        operands = [n for n in node.all_input_nodes if n in self._nodes and tensor(n) is not None]
        had = any(self._has(starts, operand) for operand in operands)
        return had and not self._has(starts, node)

    def _has(self, starts: tuple[Var, ...], node: Node) -> bool:
        ends = [(node, dim) for dim in range(len(sizes(node)))]
        return any(self._reaches(start, end) for start in starts for end in ends)


def _changes_tokens(node: Node) -> Refusal:
    return Refusal(
        f"{node.target}, between the vision tower's last attention and the merge, does not keep "
        "one vision token for each of the tower's (they are pooled, grouped, packed or cut), so no "
        "attention is that of one vision token",
        node,
        advice=ADVICE,
    )


def _leaves_out(node: Node) -> int:
    """How many entries a slice leaves out, all of them first ones; 0 for any other call."""
    if packet(node) is not aten.slice:
        return 0
    source, start = argument(node, "self"), argument(node, "start")
    dim = argument(node, "dim", 0) % len(sizes(source))
    if type(start) is not int or start < 1 or argument(node, "step", 1) != 1:
        return 0
    return start if same_size(sizes(source)[dim] - start, sizes(node)[dim]) else 0


def _images_of(rows: Node) -> Node | None:
    """The value [I, P, D] whose images, one after the other, are joined to rows [I * P, D]."""
    if packet(rows) not in _CAT:
        parts = [rows]
    elif argument(rows, "dim", 0) == 0:
        parts = argument(rows, "tensors")
    else:
        return None
    picked = [_picked(part) for part in parts]
    source = picked[0][0] if picked else None
    if source is None or not same_size(sizes(source)[0], len(parts)):
        return None
    return source if picked == [(source, i) for i in range(len(parts))] else None


def _picked(part: Node) -> tuple[Node | None, int]:
    """Of which value a part is which image."""
    if packet(part) is aten.select and argument(part, "dim") == 0:
        return argument(part, "self"), argument(part, "index")
    if part.target is operator.getitem and packet(part.args[0]) is aten.unbind:  # type: ignore[arg-type]
        source = part.args[0]
        if argument(source, "dim", 0) == 0:  # type: ignore[arg-type]
            return argument(source, "self"), part.args[1]  # type: ignore[arg-type,return-value]
    return None, -1


def _alike(source: Node, rows: Node) -> bool:
    """Whether the last dim of both is the same."""
    return same_size(sizes(source)[-1], sizes(rows)[-1])
