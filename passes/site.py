"""Where to cut: the vision tokens, the decoder stack they enter, and what layer K reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True)
class Merge:
    """Where vision features enter the text embeddings.

    node: the merged embeddings [B, S, D]; mask: bool, broadcastable to node's shape;
    features: the vision features, any shape holding N_total * D values.
    """

    node: Node
    mask: Node
    features: Node


@dataclass(frozen=True)
class Stack:
    """A decoder stack: the container's module path and each node's layer index."""

    path: str
    layers: int
    layer_of: dict[Node, int] = field(repr=False)

    def nodes(self, index: int) -> list[Node]:
        """The nodes of one layer, in graph order."""
        return [n for n, i in self.layer_of.items() if i == index]


@dataclass(frozen=True)
class Vision:
    """Where the vision tokens are: the embeddings that hold them and their mask.

    embeds: [B, S, D]; masks: bool nodes to be united, each broadcastable to embeds (or [B, S]);
    features: nodes whose element count over D gives the number of feature rows;
    row_count: an empty [rows, 0] node with those whose features are not at hand.
    """

    embeds: Node
    masks: tuple[Node, ...]
    features: tuple[Node, ...]
    how: str
    row_count: Node | None = None


@dataclass(frozen=True)
class Site:
    """Where to cut.

    hidden: what layer K takes from layer K-1 [B, S, D], or layer 0 of the embeddings;
    keys: post-RoPE keys of layer K-1 [B, H, S, Dh], None before layer 0;
    attention_mask: what layer K-1 (before layer 0: layer 0) attends with, [*, *, Q, S], or None;
    mask_hides: whether its True means a hidden key;
    norm: the nodes from the last layer's output to the final norm's output, in order;
    norm_input: the last layer's output that ``norm`` starts from.
    """

    vision: Vision
    stack: Stack
    layer: int
    hidden: Node
    keys: Node | None
    attention_mask: Node | None
    mask_hides: bool
    norm: tuple[Node, ...]
    norm_input: Node
