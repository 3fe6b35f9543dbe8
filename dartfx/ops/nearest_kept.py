"""Which kept token each position is merged into, and how many tokens each kept one stands for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.selection.dart import first_largest, unit_vectors

__all__ = ["log_group_sizes", "nearest"]


def nearest(hidden: Tensor, keep_idx: Tensor, vision_mask: Tensor) -> Tensor:
    """For each position the index in keep_idx of the token that it is merged into: [B, S] int64.

    hidden: [B, S, D] float, what cosines are taken of.  keep_idx: [B, S'] int64.  vision_mask:
    [B, S] bool.  A kept position has its own index; a dropped vision token that of the kept vision
    token of the largest cosine to it, ties to the lowest position; any other, and all of a row that
    keeps no vision token, -1.
    """
    units = unit_vectors(hidden)
    kept = units.gather(1, keep_idx[:, :, None].expand(-1, -1, hidden.shape[2]))
    candidate = vision_mask.gather(1, keep_idx)
    alike = (units @ kept.transpose(1, 2)).nan_to_num(0)
    alike = alike.masked_fill(~candidate[:, None], -torch.inf)
    slot = torch.arange(keep_idx.shape[1], device=hidden.device)
    at = first_largest(alike)[..., 0]
    own = torch.full_like(at, -1).scatter(1, keep_idx, slot.expand_as(keep_idx))
    dropped = vision_mask & (own < 0) & candidate.any(1, keepdim=True)
    return torch.where(dropped, at, own)


# Opaque, so that autocast around the model cannot take cosines in fewer bits.
@custom_op(
    "dartfx::nearest_kept",
    mutates_args=(),
    schema="(Tensor hidden, Tensor keep_idx, Tensor vision_mask) -> Tensor",
)
def _nearest_kept(hidden: Tensor, keep_idx: Tensor, vision_mask: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return nearest(hidden, keep_idx, vision_mask)


@_nearest_kept.register_fake
def _nearest_kept_fake(hidden: Tensor, keep_idx: Tensor, vision_mask: Tensor) -> Tensor:
    return torch.empty_like(vision_mask, dtype=torch.int64)


def log_group_sizes(index: Tensor, keep_idx: Tensor) -> Tensor:
    """The log of how many tokens each kept one stands for, itself included: [B, S'] float32.

    index: [B, S] as :func:`nearest` gives it for this keep_idx [B, S'].
    """
    counted = index.ge(0).float()
    sizes = counted.new_zeros(keep_idx.shape).scatter_add(1, index.clamp_min(0), counted)
    return sizes.clamp_min(1).log()


# One node, by which :func:`dartfx.runtime.keep_idx.return_keep_idx` finds the sizes in a graph.
@custom_op(
    "dartfx::log_group_sizes",
    mutates_args=(),
    schema="(Tensor index, Tensor keep_idx) -> Tensor",
)
def _log_group_sizes(index: Tensor, keep_idx: Tensor) -> Tensor:
    return log_group_sizes(index, keep_idx)


@_log_group_sizes.register_fake
def _log_group_sizes_fake(index: Tensor, keep_idx: Tensor) -> Tensor:
    return torch.empty_like(keep_idx, dtype=torch.float32)
