"""What the passes tell one another: frozen values, never attributes on a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from .selection import Select

Size = int | torch.SymInt


@dataclass(frozen=True)
class Declined:
    """The graph holds vision tokens but cannot be pruned; nothing was changed.

    ``where`` is the user's own source line of the node that stopped us, or "".
    ``broken_may_do``: several smaller graphs of the same call may be prunable.
    """

    because: str
    where: str = ""
    advice: str = ""
    broken_may_do: bool = False

    def __str__(self) -> str:
        parts = [self.because]
        if self.where:
            parts.append(f"at {self.where}")
        if self.advice:
            parts.append(f"try: {self.advice}")
        return "; ".join(parts)


class Refusal(Exception):
    """Carries a :class:`Declined` out of a pass to the pipeline, which returns it as a value."""

    def __init__(
        self,
        because: str,
        node: Node | None = None,
        advice: str = "",
        broken_may_do: bool = False,
    ) -> None:
        from .graph import source_line

        where = source_line(node) if node is not None else ""
        self.declined = Declined(because, where, advice, broken_may_do)
        super().__init__(str(self.declined))


class NoDecoder(Refusal):
    """The graph is none of ours: a mask given for a whole call comes by every graph of it."""


@dataclass(frozen=True)
class Untouched:
    """The graph is right as it is: it holds no vision tokens, or all of them are retained.

    all_retained: the second case; unsure: vision tokens may enter in a way that is not seen here.
    In both a person who asked for pruning should hear of it.
    """

    because: str
    all_retained: bool = False
    unsure: bool = False


@dataclass(frozen=True)
class Merge:
    """One place where vision features enter the text embeddings.

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
    carrier: an empty [rows, 0] node that says it instead, where no features are at hand.
    """

    embeds: Node
    masks: tuple[Node, ...]
    features: tuple[Node, ...]
    how: str
    carrier: Node | None = None


@dataclass(frozen=True)
class Site:
    """Where to cut.

    hidden: what layer K takes from layer K-1 [B, S, D];
    keys: post-RoPE keys of layer K-1 [B, H, S, Dh];
    attention_mask: the mask layer K-1 attends with, [*, *, Q, S], or None;
    mask_hides: whether its True means a hidden key;
    norm: the nodes from the last layer's output to the final norm's output, in order;
    norm_input: the last layer's output that ``norm`` starts from.
    """

    vision: Vision
    stack: Stack
    layer: int
    hidden: Node
    keys: Node
    attention_mask: Node | None
    mask_hides: bool
    norm: tuple[Node, ...]
    norm_input: Node


@dataclass(frozen=True)
class Stage:
    """One cut.

    layer: K, the first decoder layer that sees the sequence as this cut leaves it;
    retain: N -> R of the tokens that the prompt had, for int and SymInt alike;
    select: emits the selection and returns keep_idx int64 [B, S'], see selection.py.
    """

    layer: int
    retain: Callable[[Size], Size]
    select: Select


@dataclass(frozen=True)
class Request:
    """What the caller wants of the pipeline.

    stages: where to cut, layers ascending, each retaining no more than the one before;
    kv_layout: "auto", "layered" or "uniform";
    recounts: the caller sets each sliding cache's own token count from its keys after the call;
    remasks: the caller gathers the decode mask's columns as the rows' tokens were gathered;
    always: rewrite the graph even where R >= N leaves nothing to drop, to check the rewriting.
    """

    stages: tuple[Stage, ...]
    kv_layout: str = "auto"
    recounts: bool = False
    remasks: bool = False
    always: bool = False


@dataclass(frozen=True)
class Crossing:
    """One value gathered at the cut: its name, shape, token dims and the user's source line."""

    name: str
    shape: tuple[str, ...]
    dims: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Across:
    """How the ranks of a tensor-parallel graph come to select the same tokens.

    group: the process group's name; ranks: its size; how: what of the keys is exchanged; proof:
    digest of how the kept tokens come about, which must be equal on every rank.
    """

    group: str
    ranks: int
    how: str
    proof: str


@dataclass(frozen=True)
class Cut:
    """One cut that was made before decoder layer ``layer``.  Sizes are those of the example.

    vision_tokens, retained: per sample, before and after; sequence: S and S'; crossings: every
    value that was gathered there; across: what ranks exchange, None in a graph of one process.
    """

    layer: int
    vision_tokens: int
    retained: int
    sequence: tuple[int, int]
    crossings: tuple[Crossing, ...]
    across: Across | None = None


@dataclass(frozen=True)
class Pruned:
    """What was done to a graph, which is now pruned.  Sizes are those of the traced example.

    how: where the vision mask came from; cuts: at least one, by layer; flops, kv_bytes: before and
    after all of them; kv_layout: "layered", "uniform" or "none returned"; seconds: of each pass.
    """

    stack: str
    how: str
    batch: int
    cuts: tuple[Cut, ...]
    kv_layout: str
    flops: tuple[int, int]
    kv_bytes: tuple[int, int]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        """The layer of the first cut."""
        return self.cuts[0].layer

    @property
    def vision_tokens(self) -> int:
        """Vision tokens per sample in the prompt."""
        return self.cuts[0].vision_tokens

    @property
    def retained(self) -> int:
        """Vision tokens per sample after the last cut."""
        return self.cuts[-1].retained

    @property
    def sequence(self) -> tuple[int, int]:
        """The sequence's length before the first cut and after the last."""
        return self.cuts[0].sequence[0], self.cuts[-1].sequence[1]

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """The values gathered at the first cut; at later ones they are gathered once more."""
        return self.cuts[0].crossings

    def hands_kept(self, request: Request) -> bool:
        """Whether the caller needs keep_idx, to gather the mask that decode reads its caches by."""
        return request.remasks and self.kv_layout == "uniform" and self.batch > 1


@dataclass(frozen=True)
class HandsOn:
    """The graph merges vision tokens but holds no decoder; it now returns their mask as well."""

    because: str


Outcome = Pruned | Declined | Untouched | HandsOn
