# mypy: ignore-errors
# (Triton compiles these bodies itself; its language has no types that mypy could check.)
"""A step of greedy coverage, for ``torch.ops.dartfx.cover_greedily`` on a GPU.

Each step is a launch, and passes on candidates, as in ``dartfx/ops/farthest/kernels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dartfx.ops.farthest.kernels import best_of
from dartfx.ops.triton_kernels import code_of

__all__ = ["take_covering"]


@triton.jit(do_not_specialize=["L", "tiles", "step"])
def take_covering(
    alike_ptr,  # [P, L, L] float32
    weight_ptr,  # [P, L] float32
    free_ptr,  # [P, L] bool
    share_ptr,  # [P] int64
    covered_ptr,  # in, out [2, P, L] float32: before even steps, before odd ones
    candidates_ptr,  # in, out [2, P, tiles] int64: of even steps, of odd ones
    kept_ptr,  # in, out [P, L] bool
    L,
    tiles,
    step,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Keeps the best candidate, and sums what each other one would raise of what is covered.

    Reads: L numbers of each slot that may be taken and of the one that is now; 8 L bytes of weights
    and of what is covered. Programs: P * tiles, of BLOCK_K slots each. No program reads what
    another one of its launch writes: candidates and coverage have two buffers each.
    """
    L = tl.cast(L, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    step = tl.cast(step, tl.int32)
    p = tl.program_id(0).to(tl.int64)
    share = tl.load(share_ptr + p).to(tl.int32)
    if step < share:
        parts = tl.num_programs(0)
        chosen = best_of(candidates_ptr + (step % 2 * parts + p) * tiles, tiles, SCAN)

        at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = at < L
        member = tl.load(free_ptr + p * L + at, mask=inside, other=0) != 0
        kept = tl.load(kept_ptr + p * L + at, mask=inside, other=0) != 0
        taken = member & (at == chosen)
        tl.store(kept_ptr + p * L + at, taken, mask=taken)
        if step + 1 < share:
            free = member & (kept == 0) & (taken == 0)
            alike_ptr += p * L * L
            row = alike_ptr + at[:, None] * L
            before_ptr = covered_ptr + (step % 2 * parts + p) * L
            after_ptr = covered_ptr + ((step + 1) % 2 * parts + p) * L
            written = tl.where(tl.program_id(1) == 0, L, 0)  # by the first tile alone
            gains = tl.zeros([BLOCK_K, BLOCK_L], tl.float32)
            for first in range(0, L, BLOCK_L):
                u = first + tl.arange(0, BLOCK_L)
                near = tl.load(alike_ptr + chosen * L + u, mask=u < L, other=0.0)
                covered = tl.load(before_ptr + u, mask=u < L, other=0.0)
                covered = tl.maximum(covered, near)
                tl.store(after_ptr + u, covered, mask=u < written)
                weight = tl.load(weight_ptr + p * L + u, mask=u < L, other=0.0)
                live = free[:, None] & (u < L)[None, :]
                x = tl.load(row + u[None, :], mask=live, other=0.0)
                gains += tl.maximum(x - covered[None, :], 0.0) * weight[None, :]
            candidate = (code_of(-tl.sum(gains, 1), free).to(tl.int64) << 32) + at
            to_ptr = candidates_ptr + ((step + 1) % 2 * parts + p) * tiles
            tl.store(to_ptr + tl.program_id(1), tl.min(candidate, 0))
