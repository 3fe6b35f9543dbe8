"""The definition of DART's selection, in plain torch with fixed shapes.

Every ranking is a stable sort over ascending positions, so all ties go to the lowest position.
Nothing here reads a tensor's value into a shape: which tokens are kept is decided with masks and
running counts, so the same code runs eagerly, under fake tensors with symbolic sizes, and fused
by a compiler.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dartfx.selection.opaque import opaque_on_cpu

__all__ = [
    "EPS",
    "Turns",
    "accumulation_dtype",
    "cosines",
    "dart",
    "first_largest",
    "key_norms",
    "plan_turns",
    "positions_of",
    "stable_order",
    "take_first",
    "take_in_turn",
    "unit_vectors",
]

EPS = 1e-8  # torch.nn.functional.cosine_similarity clamps each norm on its own at this value


def dart(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> Tensor:
    """Vision tokens that duplicate the pivots least, ``budget[b]`` of them in row ``b``.

    hidden: [B, S, D] float, after the final norm.  keys: [B, H, S, Dh] float, after rotary
    embedding.  vision_mask, text_mask: [B, S] bool.  budget: [B] int64, at most the row's vision
    tokens.  Returns kept: [B, S] bool.  Arithmetic is float32, float64 for float64 inputs.

    Pivots are the vision and text tokens with the largest L1 key norms.  The image pivots are
    kept; then each pivot, in ascending position, takes its share of the remaining vision tokens,
    those of lowest cosine similarity to it.  Source: DART (arXiv 2502.11494) section 3, with an
    exact budget, a fixed pivot order and a fixed tie rule in place of the published code's.
    """
    turns = plan_turns(keys, vision_mask, text_mask, budget, pivot_image_tokens, pivot_text_tokens)
    if turns.pivots.shape[1] == 0:
        return turns.image_pivots
    likeness = cosines(hidden, turns.pivots)
    return take_least_alike(likeness, vision_mask, turns.image_pivots, turns.quota)


class Turns(NamedTuple):
    """Which positions are pivots, and how many tokens each may take.

    image_pivots, text_pivots: [B, S] bool.  pivots: [B, P] int64, ascending positions of both,
    S - 1 in slots that a row does not need.  quota: [B, P] int64, 0 in such slots.
    """

    image_pivots: Tensor
    text_pivots: Tensor
    pivots: Tensor
    quota: Tensor


def plan_turns(
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> Turns:
    """The pivots of :func:`dart` and their shares of the budget; arguments as there."""
    counts = pivot_image_tokens, pivot_text_tokens
    return Turns(*turns_of(key_norms(keys), vision_mask, text_mask, budget, *counts))


def _turns_fake(norms: Tensor, vision: Tensor, _: Tensor, budget: Tensor, *slots: int) -> Any:
    share = budget.new_empty((budget.shape[0], sum(slots)))
    return torch.empty_like(vision), torch.empty_like(vision), share, torch.empty_like(share)


@opaque_on_cpu(
    "(Tensor norms, Tensor vision_mask, Tensor text_mask, Tensor budget, int pivot_image_tokens, "
    "int pivot_text_tokens) -> (Tensor, Tensor, Tensor, Tensor)",
    _turns_fake,
)
def turns_of(
    norms: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Turns` for keys of these norms [B, S]."""
    slots = pivot_image_tokens + pivot_text_tokens
    n_text = text_mask.sum(1).clamp(max=pivot_text_tokens)
    n_image = budget.clamp(max=pivot_image_tokens)
    # A row with no pivot at all has nothing to compare with: it keeps its largest key norms.
    n_image = torch.where(n_image + n_text == 0, budget, n_image)

    order = stable_order(-norms)[:, None]
    image_pivots = take_in_turn(order, vision_mask, n_image[:, None])
    text_pivots = take_in_turn(order, text_mask, n_text[:, None])
    if slots == 0:
        none = budget.new_empty((budget.shape[0], 0))
        return image_pivots, text_pivots, none, none.clone()
    pivots = positions_of(image_pivots | text_pivots, slots)

    n_pivots = (n_image + n_text)[:, None]
    rest = (budget - n_image)[:, None]
    slot = torch.arange(slots, device=budget.device)
    quota = rest // n_pivots.clamp(min=1) + (slot < rest % n_pivots.clamp(min=1))
    quota = torch.where(slot < n_pivots, quota, 0)
    return image_pivots, text_pivots, pivots, quota


@opaque_on_cpu(
    "(Tensor likeness, Tensor vision_mask, Tensor image_pivots, Tensor quota) -> Tensor",
    lambda likeness, vision_mask, *_: torch.empty_like(vision_mask),
)
def take_least_alike(
    likeness: Tensor, vision_mask: Tensor, image_pivots: Tensor, quota: Tensor
) -> Tensor:
    """The image pivots, and what each pivot in turn takes of the rest, least alike first.

    likeness: [B, P, S].  vision_mask, image_pivots: [B, S] bool.  quota: [B, P] int64.
    Returns [B, S] bool.
    """
    rest = vision_mask & ~image_pivots
    readable = type(quota) is Tensor and quota.device.type == "cpu"  # not while it is traced
    if readable and likeness.dtype == torch.float32:
        # All takers together take no more than this, so none looks further down its order.
        most = min(int(quota.sum(1).amax()), likeness.shape[2])
        order = _first_members(likeness, rest, most)
    else:
        order = stable_order(likeness)
    return image_pivots | take_in_turn(order, rest, quota)


def _first_members(scores: Tensor, members: Tensor, count: int) -> Tensor:
    """The first ``count`` members in :func:`stable_order`, or all and others behind them.

    scores: [B, P, S] float32.  members: [B, S] bool.  Returns [B, P, count] int64.
    """
    # As integers of the same order, each with its position behind, so that no two are equal: ties
    # need no stable sort of all.  Zeros have two signs, and NaN has many values.
    bits = torch.where(scores.isnan(), torch.inf, scores + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ranks = torch.where(members[:, None], ascending, 0x7FFFFFFF).to(torch.int64) << 32
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return (ranks | positions).topk(count, largest=False).indices


@opaque_on_cpu(
    "(Tensor order, Tensor members, Tensor quota) -> Tensor",
    lambda order, members, quota: torch.empty_like(members),
)
def take_in_turn(order: Tensor, members: Tensor, quota: Tensor) -> Tensor:
    """What P takers get who, one after the other, take their first ``quota`` of what is left.

    order: [B, P, N] int64, the first N positions of each taker's permutation.  members: [B, S]
    bool.  quota: [B, P] int64.  Returns [B, S] bool, by position.
    """
    left = members
    for j in range(order.shape[1]):
        left = left & ~take_first(order[:, j], left, quota[:, j])
    return members & ~left


def stable_order(scores: Tensor) -> Tensor:
    """Positions by ascending score along the last dim, ties to the lowest, NaN after all numbers.

    scores: [..., S] float.  Returns [..., S] int64, a permutation of the positions.
    """
    # Sorting kernels differ in where they put a NaN, above all one with its sign bit set.
    scores = torch.where(scores.isnan(), torch.inf, scores)
    return torch.sort(scores, dim=-1, stable=True).indices


def first_largest(scores: Tensor) -> Tensor:
    """Where the largest score along the last dim is, ties to the lowest: [..., S] to [..., 1]."""
    slot = torch.arange(scores.shape[-1], device=scores.device)
    # Not argmax, which does not say which of equals it takes.
    best = scores == scores.amax(-1, keepdim=True)
    return torch.where(best, slot, scores.shape[-1]).amin(-1, keepdim=True)


def take_first(order: Tensor, members: Tensor, count: Tensor) -> Tensor:
    """The first ``count[b]`` members of row ``b`` in the given order (all of them if fewer).

    order: [B, N] int64, the first N positions of a permutation.  members: [B, S] bool.
    count: [B] int64.  Returns [B, S] bool, by position.
    """
    ordered = members.gather(1, order)
    taken = ordered & (ordered.cumsum(1) <= count[:, None])
    return torch.zeros_like(members).scatter(1, order, taken)


@opaque_on_cpu(
    "(Tensor mask, SymInt size) -> Tensor",
    lambda mask, size: mask.new_empty((mask.shape[0], size), dtype=torch.int64),
)
def positions_of(mask: Tensor, size: Any) -> Tensor:
    """Positions of the first ``size`` True entries of each row, ascending.

    mask: [B, S] bool.  size: int or SymInt.  Returns [B, size] int64.  A row with fewer True
    entries repeats S - 1 at its end, so every index can be gathered with.
    """
    # The i-th True entry is where the running count first reaches i + 1.
    wanted = torch.arange(1, size + 1, device=mask.device).expand(mask.shape[0], size)
    return torch.searchsorted(mask.cumsum(1), wanted.contiguous()).clamp(max=mask.shape[1] - 1)


def key_norms(keys: Tensor) -> Tensor:
    """L1 norm of each position's key over heads and channels: [B, H, S, Dh] to [B, S]."""
    return keys.abs().sum((1, 3), dtype=accumulation_dtype(keys))


def cosines(hidden: Tensor, pivots: Tensor) -> Tensor:
    """Cosine similarity of every position to every pivot.

    hidden: [B, S, D] float.  pivots: [B, P] int64.  Returns [B, P, S].
    """
    hidden = hidden.to(accumulation_dtype(hidden))
    # Products and sums rather than a matrix product: they ignore the user's TF32 and autocast
    # settings, sum each position in the same way whatever B and S are (a padded row then selects
    # what it selects alone), and fuse into one pass over the hidden states.
    norms = (hidden * hidden).sum(-1).sqrt().clamp(min=EPS)
    rows = []
    for j in range(pivots.shape[1]):
        at = pivots[:, j, None]
        vector = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))
        rows.append((hidden * vector).sum(-1) / (norms * norms.gather(1, at)))
    return torch.stack(rows, 1)


def unit_vectors(hidden: Tensor) -> Tensor:
    """Hidden states of length 1, whose products are cosines, in the dtype that they are summed in.

    hidden: [..., D] float.  Lengths are clamped as those of :func:`cosines`.
    """
    hidden = hidden.to(accumulation_dtype(hidden))
    return hidden / (hidden * hidden).sum(-1, keepdim=True).sqrt().clamp(min=EPS)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor's values are summed in: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
