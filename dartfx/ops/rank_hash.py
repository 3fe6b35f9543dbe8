"""``torch.ops.dartfx.hash_indices``: a hash by which ranks compare their selections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

__all__ = ["hash_indices"]


@custom_op("dartfx::hash_indices", mutates_args=(), schema="(Tensor keep) -> Tensor")
def hash_indices(keep: Tensor) -> Tensor:
    """A 64-bit hash of keep_idx int64 [B, S'], order and place included: int64 [1].

    Arithmetic wraps around; the mixing is splitmix64's.
    """
    place = torch.arange(keep.numel(), device=keep.device)
    mixed = keep.reshape(-1) * 0x5851F42D4C957F2D + place * 0x14057B7EF767814F + 1
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum().reshape(1)


@hash_indices.register_fake
def _hash_indices_fake(keep: Tensor) -> Tensor:
    return keep.new_empty((1,))
