"""How a cut's selection gets into the graph: the one piece that a caller brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from dartfx.passes.graph import Emitter, same_size, sizes, tensor
from dartfx.passes.refusal import Refusal

Select = Callable[[Emitter, "SelectionInputs"], Node]
"""Emits a selection in front of the cut and returns keep_idx int64 [B, S']: for every row the
positions that stay, ascending, where S' = S - N + R."""


@dataclass(frozen=True)
class SelectionInputs:
    """What a selection may look at, as nodes of the graph in front of the cut.

    normed: emits the model's own final norm on what enters layer K, [B, S, D]; before layer 0 the
    embeddings as they are;
    keys: post-RoPE keys of layer K-1 [B, H, S, Dh]; of no heads before layer 0;
    vision_mask: bool [B, S];
    valid: bool [B, S], False at pads, or None where no mask reaches attention;
    vision_tokens, retain: N and R, literals or nodes;
    queries: gives post-RoPE queries of layer K-1 [B, Hq, S, Dh], so scaled that their products with
    the keys over sqrt(Dh) are that layer's scores.  Raises Refusal where they cannot be identified;
    tower_attention: gives the attention that each vision token gets in the vision tower, [B, S].
    Raises Refusal where this graph does not show it.
    """

    normed: Callable[[], Node]
    keys: Node
    vision_mask: Node
    valid: Node | None
    vision_tokens: int | Node
    retain: int | Node
    queries: Callable[[], Node]
    tower_attention: Callable[[], Node]


@dataclass(frozen=True)
class ByOperator:
    """Selects by one operator: operator(normed, keys, vision_mask, valid, N, R, *args).

    queries: whether it is also given queries, behind ``args``;
    more: arguments behind the queries;
    tower_attention: whether it is given that, by keyword;
    reads: what it reads of keys, "norms" (L1, over heads and channels) or "heads";
    checks_ranks: compare the ranks' selections at run time.  Both matter under tensor parallelism.
    """

    operator: Callable[..., torch.Tensor]
    args: tuple[object, ...] = ()
    queries: bool = False
    reads: str = "heads"
    checks_ranks: bool = False
    more: tuple[object, ...] = ()
    tower_attention: bool = False

    def __call__(self, emit: Emitter, inputs: SelectionInputs) -> Node:
        return emit(
            self.operator,
            inputs.normed(),
            inputs.keys,
            inputs.vision_mask,
            inputs.valid,
            inputs.vision_tokens,
            inputs.retain,
            *self.args,
            *((inputs.queries(),) if self.queries else (None,) if self.more else ()),
            *self.more,
            **({"tower_attention": inputs.tower_attention()} if self.tower_attention else {}),
        )


@dataclass(frozen=True)
class Given:
    """Keeps the vision tokens that an input of the graph marks: the ``index``-th placeholder.

    The input is bool [B, S], True at the vision tokens to keep: R in every row that holds N.  A row
    that marks another number fails at run time, naming the row; text is always kept.  Raises
    Refusal when the input is of another shape or dtype.
    """

    index: int = 0

    def __call__(self, emit: Emitter, inputs: SelectionInputs) -> Node:
        marked = [n for n in emit.graph.nodes if n.op == "placeholder"][self.index]
        value, vision = tensor(marked), inputs.vision_mask
        if value is None or value.dtype != torch.bool or value.ndim != 2:
            raise Refusal("a given selection must be bool [B, S]", marked)
        if not all(map(same_size, sizes(marked), sizes(vision))):
            raise Refusal(
                f"a given selection of shape {[str(s) for s in sizes(marked)]} does not fit a "
                f"sequence of shape {[str(s) for s in sizes(vision)]}",
                marked,
            )
        return emit(
            torch.ops.dartfx.keep_given.default,
            marked,
            vision,
            inputs.valid,
            inputs.vision_tokens,
            inputs.retain,
        )
