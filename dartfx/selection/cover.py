"""Facility location: every vision token has a similar one among those kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.selection.dart import (
    accumulation_dtype,
    first_largest,
    positions_of,
    unit_vectors,
)
from dartfx.selection.quotas import split_budget

__all__ = ["cover", "cover_by_steps", "cover_greedily", "relevant"]

# Vision tokens that are compared with each other: an image of 24 x 24 patches, or a tile.
STRETCH = 576
# Text tokens whose attention counts, so that a long prompt costs no more than a question.
_READERS = 32


def cover(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    most: int,
    **pivots: Any,
) -> Tensor:
    """The vision tokens that cover all of them best, taken greedily.

    most: the largest budget.  The others, and the result, as in
    :class:`dartfx.selection.registry.Selector`.  Covered is sum over vision tokens u of max(0, max
    over kept k of cos(u, k)); each step keeps the token that raises it most, ties to the lowest
    position.

    Source: the set coverage of SCOPE (arXiv 2510.24214) section 3.  What differs: SCOPE multiplies
    a token's gain by its saliency, which is left out here (``relevant`` weighs what is covered
    instead); and a row of more than 576 vision tokens is cut into equal stretches of at most so
    many, each with its share of the budget, so that stretches take their steps side by side.
    Arithmetic is float32, float64 for float64 inputs.
    """
    return _covering(
        hidden, torch.ones_like(vision_mask, dtype=hidden.dtype), vision_mask, budget, most
    )


def relevant(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    queries: Tensor,
    most: int,
    **pivots: Any,
) -> Tensor:
    """As ``cover``, each u counting by how much the text behind the image attends to it.

    queries: [B, Hq, S, Dh], Hq a multiple of the keys' heads.  The weight of a vision token is the
    attention of layer K-1 that it gets from the last 32 tokens of ``text_mask``, the mean over them
    and over heads, of each one's attention to vision tokens alone.  Without such text all weights
    are equal.

    Source: TOPS (arXiv 2606.27161), which keeps tokens by task relevance, information coverage and
    semantic diversity.  What differs: one sum has all three, relevance as the weight of what is
    covered, and a token that is covered already adds nothing; TOPS has a term for each.
    """
    weights: Tensor = torch.ops.dartfx.attention_to(queries, keys, vision_mask, text_mask)
    return _covering(hidden, weights, vision_mask, budget, most)


def _covering(
    hidden: Tensor, weights: Tensor, vision_mask: Tensor, budget: Tensor, most: int
) -> Tensor:
    units = unit_vectors(hidden)
    weights = weights.to(units.dtype)
    kept: Tensor = torch.ops.dartfx.take_covering(units, weights, vision_mask, budget, most)
    return kept


# Opaque, because what it is made of is a loop of as many steps as tokens are kept.
@custom_op(
    "dartfx::take_covering",
    mutates_args=(),
    schema=("(Tensor units, Tensor weights, Tensor members, Tensor budget, SymInt most) -> Tensor"),
)
def _take_covering(
    units: Tensor, weights: Tensor, members: Tensor, budget: Tensor, most: int
) -> Tensor:
    stretches = _Stretches(members)
    shares = split_budget(stretches.sizes, budget, torch.zeros_like(stretches.sizes))
    vectors, weight = stretches.gather(units), stretches.gather(weights)
    # Not autocast to fewer bits: the order of gains is what is kept.
    with torch.autocast(units.device.type, enabled=False):
        alike = (vectors @ vectors.transpose(-1, -2)).nan_to_num(0)
    weight = torch.where(stretches.filled, weight.nan_to_num(0), 0)
    alike, weight = alike.flatten(0, 1), weight.flatten(0, 1)
    free, share = stretches.filled.flatten(0, 1), shares.view(-1, 1)
    # On the CPU one after the other: a stretch's cosines stay in the cache over its steps.
    on_cpu, kept = members.device.type == "cpu", []
    size = 1 if on_cpu else len(share)
    for start in range(0, len(share), size):
        at = slice(start, start + size)
        steps = int(share[at]) if on_cpu else most
        kept.append(cover_greedily(alike[at], weight[at], free[at], share[at], steps))
    return stretches.scatter(torch.cat(kept).view_as(stretches.filled))


def cover_by_steps(alike: Tensor, weight: Tensor, free: Tensor, share: Tensor, most: int) -> Tensor:
    """The slots that each stretch keeps: [P, L] bool, ``share[p]`` of those that are free.

    alike: [P, L, L] cosines.  weight: [P, L].  free: [P, L] bool.  share: [P, 1] int64, none above
    ``most``.
    """
    covered, kept = torch.zeros_like(weight), torch.zeros_like(free)
    slot = torch.arange(free.shape[1], device=free.device)
    for step in range(most):
        gain = (alike - covered[:, None]).clamp_(min=0).mul_(weight[:, None]).sum(-1)
        gain = torch.where(free, gain, -torch.inf)
        at = first_largest(gain)
        taken = (slot == at) & free & (step < share)
        kept, free = kept | taken, free & ~taken
        nearest = alike.gather(1, at[..., None].expand(-1, -1, free.shape[1]))[:, 0]
        raised = torch.maximum(covered, nearest)
        covered = torch.where(taken.any(1, keepdim=True), raised, covered)
    return kept


# An operator of its own, so that dartfx/ops/covering/ takes its steps on a GPU.
cover_greedily = custom_op(
    "dartfx::cover_greedily",
    cover_by_steps,
    mutates_args=(),
    schema="(Tensor alike, Tensor weight, Tensor free, Tensor share, SymInt most) -> Tensor",
)


@cover_greedily.register_fake
def _cover_greedily_fake(
    alike: Tensor, weight: Tensor, free: Tensor, share: Tensor, most: int
) -> Tensor:
    return torch.empty_like(free)


class _Stretches:
    """Each row's v vision tokens, in order, as ceil(v / 576) stretches of equal length.

    sizes: [B, P] int64.  filled: [B, P, L] bool, which slots hold a token.  On the CPU P and L are
    as small as the rows let them be; elsewhere they follow from S, because reading the mask would
    wait for the device.
    """

    def __init__(self, members: Tensor) -> None:
        count = members.sum(1, keepdim=True)
        most = int(count.max()) if members.device.type == "cpu" else members.shape[1]
        most = max(most, 1)
        parts = (count + STRETCH - 1).div(STRETCH, rounding_mode="floor").clamp(min=1)
        number = torch.arange(-(-most // STRETCH) + 1, device=members.device).clamp(max=parts)
        # Token t is in stretch t * parts // count, so that a stretch begins at the next multiple.
        starts = (number * count + parts - 1).div(parts, rounding_mode="floor")
        self.sizes = starts.diff(dim=1)
        slot = torch.arange(min(STRETCH, most), device=members.device)
        self.filled = slot < self.sizes[..., None]
        token = (starts[:, :-1, None] + slot).clamp(max=most - 1)
        positions = positions_of(members, most)
        self._at = positions.gather(1, token.flatten(1))
        self._members = members

    def gather(self, values: Tensor) -> Tensor:
        """[B, S, ...] to [B, P, L, ...]."""
        index = self._at.view(*self._at.shape, *[1] * (values.ndim - 2))
        rows = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
        return rows.view(*self.filled.shape, *values.shape[2:])

    def scatter(self, chosen: Tensor) -> Tensor:
        """[B, P, L] bool to [B, S] bool."""
        count = torch.zeros(self._members.shape, dtype=torch.int64, device=chosen.device)
        return count.scatter_add(1, self._at, chosen.flatten(1).long()) > 0


@_take_covering.register_fake
def _take_covering_fake(
    units: Tensor, weights: Tensor, members: Tensor, budget: Tensor, most: int
) -> Tensor:
    return torch.empty_like(members)


@custom_op(
    "dartfx::attention_to",
    mutates_args=(),
    schema="(Tensor queries, Tensor keys, Tensor members, Tensor readers) -> Tensor",
)
def _attention_to(queries: Tensor, keys: Tensor, members: Tensor, readers: Tensor) -> Tensor:
    """What the last readers of a row pay to its members, mean over heads and readers: [B, S].

    queries: [B, Hq, S, Dh].  keys: [B, H, S, Dh].  members, readers: [B, S] bool.
    """
    dtype = accumulation_dtype(keys)
    behind = readers.sum(1, keepdim=True) - readers.cumsum(1)
    last = readers & (behind < _READERS)
    at = positions_of(last, _READERS)[:, None, :, None]
    query = queries.gather(2, at.expand(-1, queries.shape[1], -1, queries.shape[3])).to(dtype)
    grouped = query.view(query.shape[0], keys.shape[1], -1, keys.shape[3])
    with torch.autocast(keys.device.type, enabled=False):
        scores = grouped @ keys.to(dtype).transpose(-1, -2) / math.sqrt(keys.shape[3])
    # All vision tokens precede these readers, so a causal mask would hide none of them.
    shares = scores.masked_fill(~members[:, None, None], -math.inf).softmax(-1)
    shares = shares.view(*queries.shape[:2], _READERS, -1).mean(1)
    slot = torch.arange(_READERS, device=keys.device)
    present = (slot < last.sum(1, keepdim=True))[:, :, None]
    weights = torch.where(present, shares, 0).sum(1) / present.sum(1).clamp(min=1)
    return torch.where(present.any(1), weights, 1)


@_attention_to.register_fake
def _attention_to_fake(queries: Tensor, keys: Tensor, members: Tensor, readers: Tensor) -> Tensor:
    return keys.new_empty(members.shape, dtype=accumulation_dtype(keys))
