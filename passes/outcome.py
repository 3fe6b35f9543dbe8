"""The outcome for a graph: pruned, declined, or unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

from dartfx.passes.refusal import Declined
from dartfx.passes.request import Request


@dataclass(frozen=True)
class Unchanged:
    """The graph is right as it is: it holds no vision tokens, or all of them are retained.

    all_retained: the second case; unsure: vision tokens may enter in a way that is not seen here.
    In both a user who requested pruning should be informed.
    """

    because: str
    all_retained: bool = False
    unsure: bool = False


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
    """One cut before decoder layer ``layer``.  Sizes are those of the example.

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
class OrderMixing:
    """Layers behind the first cut that mix tokens by their order, and the operators that do."""

    layers: int
    operators: tuple[str, ...]

    def __str__(self) -> str:
        count = "1 layer mixes" if self.layers == 1 else f"{self.layers} layers mix"
        return f"{count} tokens by order: {', '.join(self.operators)}"


@dataclass(frozen=True)
class Pruned:
    """What was done to a graph, which is now pruned.  Sizes are those of the traced example.

    how: where the vision mask came from; cuts: at least one, by layer; flops, kv_bytes: before and
    after all of them; kv_layout: "layered", "uniform" or "none returned"; seconds: of each pass;
    order_mixing: what runs over the kept tokens in their order, None where nothing does.
    """

    stack: str
    how: str
    batch: int
    cuts: tuple[Cut, ...]
    kv_layout: str
    flops: tuple[int, int]
    kv_bytes: tuple[int, int]
    seconds: dict[str, float] = field(default_factory=dict)
    order_mixing: OrderMixing | None = None

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
        """The values gathered at the first cut; later cuts gather them again."""
        return self.cuts[0].crossings

    def needs_keep_idx(self, request: Request) -> bool:
        """Whether the caller needs keep_idx, to gather the mask that decode reads its caches by."""
        return request.gathers_decode_mask and self.kv_layout == "uniform" and self.batch > 1


@dataclass(frozen=True)
class ReturnsMask:
    """The graph merges vision tokens but holds no decoder; it now returns their mask as well."""

    because: str


Outcome = Pruned | Declined | Unchanged | ReturnsMask
