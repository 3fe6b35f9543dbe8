"""``torch.ops.dartfx.take_apart`` as one Triton launch for each kept token, on a GPU.

The plain form takes about ten launches a step and passes the products of all hidden states through
memory; see ``dartfx/selection/spread.py`` for what is computed.  Imports Triton lazily.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dartfx.ops import triton_launch
from dartfx.selection.dart import first_largest
from dartfx.selection.spread import places, scores_of, take_apart, take_apart_by_steps

__all__ = ["farthest", "on_gpu"]

_TILE = (8, 512)  # positions, channels
_SCAN_TILE = 512


def farthest(units: Tensor, first: Tensor, members: Tensor, budget: Tensor, most: int) -> Tensor:
    """What ``take_apart`` keeps, [B, S] bool; arguments as there, units float32."""
    from dartfx.ops.farthest.kernels import NOBODY, take_farthest

    batch, sequence, width = units.shape
    block, channels = _TILE
    tiles = (sequence + block - 1) // block
    members, units = members.contiguous(), units.contiguous()
    score = torch.where(members, scores_of(first), -torch.inf)
    candidates = torch.full((2, batch, tiles), NOBODY.value, device=units.device)
    candidates[0, :, :1] = first_largest(score)
    nearest, kept = torch.full_like(score, torch.inf), torch.zeros_like(members)
    arguments = units, members, places(members, budget, units.dtype), budget.contiguous()
    # Triton launches on the current device, whichever device the tensors are on.
    with torch.cuda.device_of(units):  # type: ignore[no-untyped-call]
        for step in range(most):
            take_farthest[(batch, tiles)](
                *(*arguments, nearest, candidates, kept, sequence, tiles, step),
                D=width,
                BLOCK_S=block,
                BLOCK_D=min(channels, 1 << max(width - 1, 0).bit_length()),
                SCAN=_SCAN_TILE,
            )
    return kept


def on_gpu(units: Tensor, first: Tensor, members: Tensor, budget: Tensor, most: int) -> Tensor:
    """``take_apart`` on a device of the type "cuda": by the kernel where it serves."""
    served = units.dtype == torch.float32 and not triton_launch.unavailable(units.device)
    run = farthest if served else take_apart_by_steps
    return run(units, first, members, budget, most)


take_apart.register_kernel("cuda", on_gpu)
