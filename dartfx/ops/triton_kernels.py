# mypy: ignore-errors
# (Triton compiles these bodies itself; its language has no types that mypy could check.)
"""The Triton kernels of ``select_tokens``: DART's selection in five launches.

    key_norms   scores of all possible pivots         reads the keys once
    rank        who is the best pivot, second best, ...
    cosines     similarity of vision tokens to pivots reads the vision tokens' hidden states once
    rank        who is least similar to each pivot, second least, ...
    select      budgets, quotas, picks, pads, ascending positions

A launch ends wherever all programs need a result of all others; nothing else would order them.
Between launches only small arrays pass through memory: a score (float32) and a rank (int32) per
position and ranking, and for each ranking a list of positions by rank.

No kernel uses atomics or reads what another program of its launch writes, so results do not
depend on scheduling. A sum over channels is taken in the same order for every position, whatever
the batch and the length, so equal tokens have equal scores. Scores of a ranking are float32: the
lowest is first, ties go to the lowest position, +inf stands for a NaN, and a NaN for "not in this
ranking", which no comparison ever counts.

Torch finds out which arguments a kernel writes by following the address of each store back to the
nearest load. It takes a helper function that loads for one that writes, copies what it is given,
and orders everything else around it; so all loads stand in the kernels' own bodies.

S and all counts are run-time arguments and loops go over tiles of fixed size: one compilation
serves every prompt length. Counts fit 32 bits, but a compiler that cannot prove it passes 64, which
the loops would not accept; so each kernel narrows them. Offsets in memory are 64 bits wherever they
can exceed 32. Rows of the batch are the grid's first dimension, the only one without a limit of
65,535.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["cosines", "key_norms", "rank", "select"]


@triton.jit(do_not_specialize=["S"])
def key_norms(
    keys_ptr,  # [B, H, S, Dh], any strides
    vision_ptr,  # [B, S] bool
    valid_ptr,  # [B, S] bool, not read without HAS_VALID
    scores_ptr,  # out [B, 2, S] float32
    pivots_ptr,  # out [B, 2, CAPACITY] int32
    S,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    CHANNELS: tl.constexpr,  # H * Dh
    HEAD: tl.constexpr,  # Dh
    HAS_VALID: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCAN: tl.constexpr,  # at least 2 * CAPACITY
):
    """Minus the L1 key norm of each position that can be a pivot; clears the lists of pivots.

    scores[:, 0] ranks vision tokens, scores[:, 1] text after the row's last vision token.
    Reads: H * Dh keys of each of these positions, once; the masks; and from each text position
    on, the rest of the vision mask (one byte per position). Programs: BLOCK_S positions each, few,
    so that a single short prompt already fills the device.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    start = tl.program_id(1) * BLOCK_S
    at = start + tl.arange(0, BLOCK_S)
    inside = at < S
    vision = tl.load(vision_ptr + b * S + at, mask=inside, other=0) != 0
    text = inside & (vision == 0)
    if HAS_VALID:
        text = text & (tl.load(valid_ptr + b * S + at, mask=inside, other=0) != 0)

    lane = tl.arange(0, SCAN)
    if tl.max(text.to(tl.int32), 0) > 0:
        last = tl.full([SCAN], -1, tl.int32)
        for first in range(start, S, SCAN):
            position = first + lane
            marked = tl.load(vision_ptr + b * S + position, mask=position < S, other=0) != 0
            last = tl.where(marked, position, last)
        text = text & (at > tl.max(last, 0))

    read = vision | text
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    row = keys_ptr + b * stride_b + at[:, None].to(tl.int64) * stride_s
    for channel in tl.static_range(0, CHANNELS, BLOCK_C):
        c = channel + tl.arange(0, BLOCK_C)
        offset = (c // HEAD).to(tl.int64) * stride_h + (c % HEAD).to(tl.int64) * stride_d
        live = read[:, None] & (c < CHANNELS)[None, :]
        total += tl.abs(tl.load(row + offset[None, :], mask=live, other=0.0).to(tl.float32))
    norm = tl.sum(total, 1)

    score = tl.where(norm == norm, -norm, float("inf"))
    scores_ptr += b * 2 * S
    tl.store(scores_ptr + at, tl.where(vision, score, float("nan")), mask=inside)
    tl.store(scores_ptr + S + at, tl.where(text, score, float("nan")), mask=inside)
    if start == 0:
        absent = tl.full([SCAN], -1, tl.int32)
        tl.store(pivots_ptr + b * 2 * CAPACITY + lane, absent, mask=lane < 2 * CAPACITY)


@triton.jit(do_not_specialize=["S", "capacity"])
def rank(
    scores_ptr,  # [B, L, S] float32
    ranks_ptr,  # out [B, S, L] int32, written where the score is not NaN
    order_ptr,  # out [B, L, capacity] int32: the position of each rank below capacity
    S,
    capacity,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,  # a multiple of BLOCK
):
    """Rank of each position by ascending (score, position), by counting who is ahead of it.

    Counting takes S comparisons per position where a sort would take log S, but they are
    independent of each other: no barrier, and a program for every BLOCK positions of every
    ranking. Reads: 4 bytes per position, S / BLOCK times, from cache. Before and after the tile
    of OTHERS positions that holds a position, a tie is decided by the tile.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    rankings = tl.num_programs(1)
    ranking = b * rankings + tl.program_id(1)
    scores_ptr += ranking * S
    start = tl.program_id(2) * BLOCK
    lane = tl.arange(0, OTHERS)
    at = start + tl.arange(0, BLOCK)
    mine = tl.load(scores_ptr + at, mask=at < S, other=float("nan"))
    member = mine == mine
    if tl.max(member.to(tl.int32), 0) > 0:
        ahead = tl.zeros([BLOCK, OTHERS], tl.int32)
        own = start // OTHERS * OTHERS
        for first in range(0, own, OTHERS):
            other = tl.load(scores_ptr + first + lane)
            ahead += (other[None, :] <= mine[:, None]).to(tl.int32)
        other = tl.load(scores_ptr + own + lane, mask=own + lane < S, other=float("nan"))
        tie = (other[None, :] == mine[:, None]) & ((own + lane)[None, :] < at[:, None])
        ahead += ((other[None, :] < mine[:, None]) | tie).to(tl.int32)
        for first in range(own + OTHERS, S, OTHERS):
            other = tl.load(scores_ptr + first + lane, mask=first + lane < S, other=float("nan"))
            ahead += (other[None, :] < mine[:, None]).to(tl.int32)
        place = tl.sum(ahead, 1)
        # One after the other for each position, because `select` reads them together.
        rank_at = (b * S + at) * rankings + tl.program_id(1)
        tl.store(ranks_ptr + rank_at, place, mask=member)
        tl.store(order_ptr + ranking * capacity + place, at, mask=member & (place < capacity))


@triton.jit(do_not_specialize=["S"])
def cosines(
    hidden_ptr,  # [B, S, D], any strides
    vision_ptr,  # [B, S] bool
    pivots_ptr,  # [B, 2, CAPACITY] int32
    scores_ptr,  # out [B, IMAGE + TEXT, S] float32
    S,
    stride_b,
    stride_s,
    stride_d,
    D: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    CAPACITY: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Cosine similarity of each vision token to each pivot.

    Reads: D values of each vision token once per BLOCK_P pivots (the default 8 pivots: once), and
    of BLOCK_P pivots in every program, from cache. Products are summed in float32 rather than by
    the matrix units: at 8 products per value read, memory is what limits either way, and float32
    inputs need no other path.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    at = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = at < S
    vision = tl.load(vision_ptr + b * S + at, mask=inside, other=0) != 0
    slot = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    entry = tl.where(slot < IMAGE, slot, CAPACITY + slot - IMAGE)
    pivot_at = pivots_ptr + b * 2 * CAPACITY + entry
    pivot = tl.load(pivot_at, mask=slot < IMAGE + TEXT, other=-1)

    hidden_ptr += b * stride_b
    dots = tl.zeros([BLOCK_S, BLOCK_P, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    pivot_squares = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=3):
        d = first + tl.arange(0, BLOCK_D)
        column = d[None, :].to(tl.int64) * stride_d
        x_at = at[:, None].to(tl.int64) * stride_s + column
        y_at = pivot[:, None].to(tl.int64) * stride_s + column
        channel = (d < D)[None, :]
        x = tl.load(hidden_ptr + x_at, mask=vision[:, None] & channel, other=0.0).to(tl.float32)
        y = tl.load(hidden_ptr + y_at, mask=(pivot >= 0)[:, None] & channel, other=0.0)
        y = y.to(tl.float32)
        dots += x[:, None, :] * y[None, :, :]
        squares += x * x
        pivot_squares += y * y
    norms = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), EPS)
    pivot_norms = tl.maximum(tl.sqrt_rn(tl.sum(pivot_squares, 1)), EPS)
    score = tl.div_rn(tl.sum(dots, 2), norms[:, None] * pivot_norms[None, :])
    score = tl.where(score == score, score, float("inf"))
    score = tl.where(vision[:, None], score, float("nan"))
    ranking = b * (IMAGE + TEXT) + slot
    live = inside[:, None] & (slot < IMAGE + TEXT)[None, :]
    tl.store(scores_ptr + ranking[None, :] * S + at[:, None], score, mask=live)


@triton.jit
def _picked(ranks, bounds):
    """Whether one of the ranks [BLOCK, SLOTS] of a position is below the bound of its ranking."""
    return tl.max((ranks < bounds[None, :]).to(tl.int32), 1) == 1


@triton.jit(do_not_specialize=["S", "length", "retain"])
def select(
    vision_ptr,  # [B, S] bool
    valid_ptr,  # [B, S] bool, not read without HAS_VALID
    norm_ranks_ptr,  # [B, S, 2] int32
    pivots_ptr,  # [B, 2, CAPACITY] int32
    ranks_ptr,  # [B, S, IMAGE + TEXT] int32
    order_ptr,  # [B, IMAGE + TEXT, length] int32
    keep_ptr,  # out [B, length] int64
    fits_ptr,  # out [B] bool: the row's text and budget fit into length
    S,
    length,
    retain,  # min(R, N)
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    CAPACITY: tl.constexpr,
    HAS_VALID: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two, at least IMAGE + TEXT
    BLOCK: tl.constexpr,
):
    """The row's kept positions, ascending: the greedy rounds and the batch rule, one row each.

    Reads: the masks twice; about quota / BLOCK tiles of each pivot's order with the ranks of
    those positions; and all ranks of vision tokens once. The rounds are sequential by their
    definition, and short: a round's picks are among the first ``budget`` of its ranking. State
    between rounds is one bound per pivot, in registers, so no barrier is needed.
    """
    PIVOTS: tl.constexpr = IMAGE + TEXT
    S = tl.cast(S, tl.int32)
    length = tl.cast(length, tl.int32)
    retain = tl.cast(retain, tl.int32)
    b = tl.program_id(0).to(tl.int64)
    vision_ptr += b * S
    valid_ptr += b * S
    norm_ranks_ptr += b * S * 2
    ranks_ptr += b * S * PIVOTS
    order_ptr += b * PIVOTS * length
    keep_ptr += b * length
    lane = tl.arange(0, BLOCK)

    # The batch rule (see batch.py).
    vision_seen = tl.zeros([BLOCK], tl.int32)
    text_seen = tl.zeros([BLOCK], tl.int32)
    for first in range(0, S, BLOCK):
        inside = first + lane < S
        vision = tl.load(vision_ptr + first + lane, mask=inside, other=0) != 0
        text = inside & (vision == 0)
        if HAS_VALID:
            text = text & (tl.load(valid_ptr + first + lane, mask=inside, other=0) != 0)
        vision_seen += vision.to(tl.int32)
        text_seen += text.to(tl.int32)
    n_vision = tl.sum(vision_seen, 0)
    n_text = tl.sum(text_seen, 0)
    budget = tl.minimum(n_vision, tl.maximum(retain, n_vision + length - S))
    tl.store(fits_ptr + b, n_text + budget <= length)

    # Pivots and quotas.
    slot = tl.arange(0, SLOTS)
    entry = tl.where(slot < IMAGE, slot, CAPACITY + slot - IMAGE)
    pivot = tl.load(pivots_ptr + b * 2 * CAPACITY + entry, mask=slot < PIVOTS, other=-1)
    n_image = tl.minimum(budget, IMAGE)
    pivot = tl.where((slot < IMAGE) & (slot >= n_image), -1, pivot)
    n_pivots = tl.sum((pivot >= 0).to(tl.int32), 0)
    # A row with no pivot at all has nothing to compare with: it keeps its largest key norms.
    n_image = tl.where(n_pivots == 0, budget, n_image)
    rest = budget - n_image
    share = rest // tl.maximum(n_pivots, 1)
    extra = rest - share * n_pivots

    # Each pivot, in ascending position, takes its quota of what is free. It takes all that is free
    # below some bound of its ranking, and what was not free there had been taken before: so what
    # lies below the bound of any pivot is kept, and of the rest only the image pivots.
    bounds = tl.zeros([SLOTS], tl.int32)
    position = tl.full([], -1, tl.int32)
    for turn in range(n_pivots):
        position = tl.min(tl.where(pivot > position, pivot, S), 0)
        current = tl.sum(tl.where(pivot == position, slot, 0), 0)
        quota = share + (turn < extra).to(tl.int32)
        taken = tl.full([], 0, tl.int32)
        first = tl.full([], 0, tl.int32)
        end = tl.full([], 0, tl.int32)
        while (taken < quota) & (first < budget):
            place = first + lane
            ranked = place < budget
            at = tl.load(order_ptr + current * length + place, mask=ranked, other=0)
            pivotal = tl.load(norm_ranks_ptr + at * 2, mask=ranked, other=0) < n_image
            live = ranked[:, None] & (slot < PIVOTS)[None, :]
            ranks_at = ranks_ptr + at[:, None] * PIVOTS + slot[None, :]
            ranks = tl.load(ranks_at, mask=live, other=S)
            free = ranked & (pivotal == 0) & (_picked(ranks, bounds) == 0)
            mine = free & (taken + tl.cumsum(free.to(tl.int32), 0) <= quota)
            end = tl.maximum(end, tl.max(tl.where(mine, place + 1, 0), 0))
            taken += tl.sum(mine.to(tl.int32), 0)
            first += BLOCK
        bounds = tl.where(slot == current, end, bounds)

    # What stays, ascending; of the pads the lowest are dropped.
    pads_dropped = (S - n_vision - n_text) - (length - n_text - budget)
    written = tl.full([], 0, tl.int32)
    pads = tl.full([], 0, tl.int32)
    for first in range(0, S, BLOCK):
        at = first + lane
        inside = at < S
        vision = tl.load(vision_ptr + at, mask=inside, other=0) != 0
        pivotal = tl.load(norm_ranks_ptr + at * 2, mask=vision, other=0) < n_image
        live = vision[:, None] & (slot < PIVOTS)[None, :]
        ranks_at = ranks_ptr + at[:, None] * PIVOTS + slot[None, :]
        ranks = tl.load(ranks_at, mask=live, other=S)
        stays = vision & (pivotal | _picked(ranks, bounds))
        text = inside & (vision == 0)
        if HAS_VALID:
            valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0
            pad = (text & (valid == 0)).to(tl.int32)
            text = text & valid
            stays = stays | ((pad == 1) & (pads + tl.cumsum(pad, 0) > pads_dropped))
            pads += tl.sum(pad, 0)
        stays = stays | text
        target = written + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(keep_ptr + target, at.to(tl.int64), mask=stays & (target < length))
        written += tl.sum(stays.to(tl.int32), 0)
    # A row that does not fit raises; until then each of its entries must be safe to gather with.
    for first in range(written, length, BLOCK):
        filler = tl.full([BLOCK], 0, tl.int64) + (S - 1)
        tl.store(keep_ptr + first + lane, filler, mask=first + lane < length)
