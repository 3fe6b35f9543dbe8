"""``torch.ops.dartfx.cover_greedily`` as one Triton launch for each kept token, on a GPU.

The plain form takes about ten launches a step, and writes gains of every pair of tokens to memory
several times; see ``dartfx/selection/cover.py`` for what is computed.  Imports Triton lazily.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dartfx.ops import triton_launch
from dartfx.selection.cover import cover_by_steps, cover_greedily
from dartfx.selection.dart import first_largest

__all__ = ["covering", "on_gpu"]

_TILE = (8, 128)  # slots that may be taken, slots that are covered
_SCAN_TILE = 128


def covering(alike: Tensor, weight: Tensor, free: Tensor, share: Tensor, most: int) -> Tensor:
    """What ``cover_greedily`` keeps, [P, L] bool; arguments as there, float32."""
    from dartfx.ops.covering.kernels import take_covering
    from dartfx.ops.farthest.kernels import NOBODY

    parts, length = free.shape
    block, width = _TILE
    tiles = (length + block - 1) // block
    alike, weight, free = alike.contiguous(), weight.contiguous(), free.contiguous()
    gain = (alike.clamp(min=0) * weight[:, None]).sum(-1)
    candidates = torch.full((2, parts, tiles), NOBODY.value, device=free.device)
    candidates[0, :, :1] = first_largest(torch.where(free, gain, -torch.inf))
    covered = torch.zeros(2, parts, length, dtype=alike.dtype, device=free.device)
    kept = torch.zeros_like(free)
    arguments = alike, weight, free, share.flatten().contiguous(), covered, candidates, kept
    # Triton launches on the current device, whichever device the tensors are on.
    with torch.cuda.device_of(alike):  # type: ignore[no-untyped-call]
        for step in range(most):
            take_covering[(parts, tiles)](
                *(*arguments, length, tiles, step),
                BLOCK_K=block,
                BLOCK_L=width,
                SCAN=_SCAN_TILE,
            )
    return kept


def on_gpu(alike: Tensor, weight: Tensor, free: Tensor, share: Tensor, most: int) -> Tensor:
    """``cover_greedily`` on a device of the type "cuda": by the kernel where it serves."""
    served = alike.dtype == torch.float32 and not triton_launch.unavailable(alike.device)
    run = covering if served else cover_by_steps
    return run(alike, weight, free, share, most)


cover_greedily.register_kernel("cuda", on_gpu)
