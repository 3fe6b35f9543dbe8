# mypy: ignore-errors
# (Triton compiles these bodies itself; its language has no types that mypy could check.)
"""A step of farthest-point sampling, for ``torch.ops.dartfx.take_apart`` on a GPU.

Steps follow each other by definition, so each is a launch: only a launch orders all programs. All
that a step needs of the one before is who was farthest, of which every tile of positions writes its
own candidate; the next launch finds the best of them in each of its programs. A candidate is one
number, its score's code above its position, so that the lowest is the one that is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dartfx.ops.triton_kernels import code_of

__all__ = ["NOBODY", "best_of", "take_farthest"]

NOBODY = tl.constexpr(0x7FFFFFFF << 32)  # behind every candidate


@triton.jit
def best_of(candidates_ptr, tiles, SCAN: tl.constexpr):
    """The position of the best of ``tiles`` candidates, which are read SCAN at a time."""
    lane = tl.arange(0, SCAN)
    best = tl.full([SCAN], NOBODY, tl.int64)
    for first in range(0, tiles, SCAN):
        found = tl.load(candidates_ptr + first + lane, mask=first + lane < tiles, other=NOBODY)
        best = tl.minimum(best, found)
    return (tl.min(best, 0) & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["S", "tiles", "step"])
def take_farthest(
    units_ptr,  # [B, S, D] float32
    members_ptr,  # [B, S] bool
    place_ptr,  # [B, S] float32
    budget_ptr,  # [B] int64
    nearest_ptr,  # in, out [B, S] float32: how far the nearest kept token is
    candidates_ptr,  # in, out [2, B, tiles] int64: of even steps, of odd ones
    kept_ptr,  # in, out [B, S] bool
    S,
    tiles,
    step,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Keeps the best candidate, and measures how far all others are from it.

    Reads: D numbers of each member that is not kept, and of the one that is now; 8 bytes of each
    tile. Programs: B * tiles, of BLOCK_S positions each. No program reads what another of its
    launch writes: candidates of the next step have a place of their own.
    """
    S = tl.cast(S, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    step = tl.cast(step, tl.int32)
    b = tl.program_id(0).to(tl.int64)
    budget = tl.load(budget_ptr + b).to(tl.int32)
    if step < budget:
        rows = tl.num_programs(0)
        chosen = best_of(candidates_ptr + (step % 2 * rows + b) * tiles, tiles, SCAN)

        at = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = at < S
        member = tl.load(members_ptr + b * S + at, mask=inside, other=0) != 0
        kept = tl.load(kept_ptr + b * S + at, mask=inside, other=0) != 0
        taken = member & (at == chosen)
        tl.store(kept_ptr + b * S + at, taken, mask=taken)
        if step + 1 < budget:
            free = member & (kept == 0) & (taken == 0)
            units_ptr += b * S * D
            row = units_ptr + at[:, None].to(tl.int64) * D
            products = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                live = free[:, None] & (d < D)[None, :]
                x = tl.load(row + d[None, :], mask=live, other=0.0)
                y = tl.load(units_ptr + chosen.to(tl.int64) * D + d, mask=d < D, other=0.0)
                products += x * y[None, :]
            place = tl.load(place_ptr + b * S + at, mask=inside, other=0.0)
            between = tl.abs(place - tl.load(place_ptr + b * S + chosen))
            apart = 1 - tl.sum(products, 1) + tl.minimum(between, 1.0)
            nearest = tl.load(nearest_ptr + b * S + at, mask=free, other=0.0)
            # What is no number stays none, and is taken last.
            nearest = tl.where((apart < nearest) | (apart != apart), apart, nearest)
            tl.store(nearest_ptr + b * S + at, nearest, mask=free)
            candidate = (code_of(-nearest, free).to(tl.int64) << 32) + at
            to_ptr = candidates_ptr + ((step + 1) % 2 * rows + b) * tiles
            tl.store(to_ptr + tl.program_id(1), tl.min(candidate, 0))
