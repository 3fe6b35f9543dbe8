"""An independent reference of the selection, in float64 numpy with Python loops.

It shares no code with dartfx. Rankings sort (score, position) pairs, so ties go to the lowest
position and NaN, mapped to infinity, ranks last. ``gaps`` records the margin of each decision:
where the smallest gap is far above float32 rounding, the operator must agree exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

EPS = 1e-8  # each norm of the cosine is clamped at this value


@dataclass
class Selection:
    """The tokens that one sample keeps, and how they were selected."""

    kept: list[int]
    image_pivots: list[int] = field(default_factory=list)
    text_pivots: list[int] = field(default_factory=list)
    picks: list[tuple[int, list[int]]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


@dataclass
class Batch:
    """Kept positions of every row of a batch [B][S'], and each row's selection."""

    keep_idx: list[list[int]]
    rows: list[Selection]

    @property
    def gap(self) -> float:
        """The smallest margin of any decision; infinite if there was none."""
        return min((gap for row in self.rows for gap in row.gaps), default=float("inf"))


Choose = Callable[[int, list[int], list[int], int], Selection]
"""(row, its vision positions, valid text positions after them, budget) -> what it keeps of them."""


class TextLost(Exception):
    """The valid text of row ``row`` does not fit."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def as_float64(tensor: Any) -> Array:
    """Convert a torch tensor of any float dtype, or an array, to float64."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().double().numpy()
    return np.asarray(tensor, dtype=np.float64)


def key_norms(keys: Array) -> Array:
    """L1 norm of each token's key over heads and channels: [H, S, Dh] to [S]."""
    result: Array = np.abs(keys).sum(axis=(0, 2))
    return result


def cosine(a: Array, b: Array) -> float:
    """Cosine similarity of two vectors, with each norm clamped separately."""
    norm_a = max(float(np.sqrt((a * a).sum())), EPS)
    norm_b = max(float(np.sqrt((b * b).sum())), EPS)
    return float((a * b).sum() / (norm_a * norm_b))


def lowest(
    scores: dict[int, float], count: int, gaps: list[float], relative: bool = False
) -> list[int]:
    """The ``count`` positions of lowest score, best first; appends the margin to ``gaps``."""
    scores = {p: float("inf") if np.isnan(s) else s for p, s in scores.items()}
    order = sorted(scores, key=lambda p: (scores[p], p))
    if 0 < count < len(order):
        last, rejected = scores[order[count - 1]], scores[order[count]]
        gap = 0.0 if last == rejected else rejected - last
        gaps.append(gap / max(abs(last), 1e-30) if relative else gap)
    return order[:count]


def select(
    hidden: Array,
    keys: Array,
    pool: list[int],
    text: list[int],
    retain: int,
    p_img: int,
    p_txt: int,
) -> Selection:
    """Select exactly min(retain, len(pool)) vision tokens of one sample.

    hidden: [S, D].  keys: [H, S, Dh].  pool: vision positions, ascending.  text: valid non-vision
    positions after the last of them, ascending.
    """
    budget = min(retain, len(pool))
    out = Selection([])
    norms = key_norms(keys)
    n_img, n_txt = min(p_img, budget), min(p_txt, len(text))
    if n_img + n_txt == 0:
        n_img = budget
    out.image_pivots = sorted(lowest({p: -norms[p] for p in pool}, n_img, out.gaps, relative=True))
    rest = budget - n_img
    out.kept = list(out.image_pivots)
    if rest:
        out.text_pivots = sorted(
            lowest({p: -norms[p] for p in text}, n_txt, out.gaps, relative=True)
        )
        pivots = sorted(out.image_pivots + out.text_pivots)
        for rank, pivot in enumerate(pivots):
            quota = rest // len(pivots) + (1 if rank < rest % len(pivots) else 0)
            free = [x for x in pool if x not in out.kept]
            similarity = {x: cosine(hidden[pivot], hidden[x]) for x in free} if quota else {}
            picked = lowest(similarity, quota, out.gaps)
            out.picks.append((pivot, picked))
            out.kept += picked
    out.kept.sort()
    return out


def select_batch(
    hidden: Any,
    keys: Any,
    vision: Any,
    retain: int,
    valid: Any = None,
    p_img: int = 4,
    p_txt: int = 4,
) -> Batch:
    """Apply the batch rule with ``select``.

    hidden: [B, S, D].  keys: [B, H, S, Dh].  vision, valid: [B, S] bool.  Raises TextLost.
    """
    hidden, keys = as_float64(hidden), as_float64(keys)

    def choose(b: int, pool: list[int], after: list[int], budget: int) -> Selection:
        return select(hidden[b], keys[b], pool, after, budget, p_img, p_txt)

    return by_batch_rule(choose, vision, retain, valid)


def by_batch_rule(choose: Choose, vision: Any, retain: int, valid: Any = None) -> Batch:
    """Apply the batch rule with any choice: every row keeps S - N + min(retain, N) positions.

    vision, valid: [B, S] bool.  N is the number of vision tokens in the batch over B, rounded
    down.  Raises TextLost for the first row whose valid text does not fit.
    """
    vision = np.asarray(vision, dtype=bool)
    ok: Mask = np.ones_like(vision) if valid is None else np.asarray(valid, dtype=bool)
    n_rows, n_positions = vision.shape
    mean = int(vision.sum()) // n_rows
    length = n_positions - mean + min(retain, mean)
    keep_idx, rows = [], []
    for b in range(n_rows):
        pool = [s for s in range(n_positions) if vision[b, s]]
        words = [s for s in range(n_positions) if ok[b, s] and not vision[b, s]]
        pads = [s for s in range(n_positions) if not ok[b, s] and not vision[b, s]]
        budget = min(len(pool), max(min(retain, mean), length - (n_positions - len(pool))))
        if len(words) + budget > length:
            raise TextLost(b)
        after = [s for s in words if pool and s > pool[-1]]
        row = choose(b, pool, after, budget)
        n_pads = length - len(words) - len(row.kept)
        keep_idx.append(sorted(row.kept + words + pads[len(pads) - n_pads :]))
        rows.append(row)
    return Batch(keep_idx, rows)
