# mypy: ignore-errors
# (Triton compiles these bodies itself; its language has no types that mypy could check.)
"""The Triton kernels of ``select_tokens``: DART's selection in six launches.

    key_norms   scores of all possible pivots, and the row's plan   reads the keys once
    shortlist   the pivots: the first few of those scores
    cosines     scores of vision tokens, one ranking per pivot      reads hidden states once
    shortlist   the first of each ranking, as many as its pivot can come to
    rank        their order
    select      the rounds, and the kept positions in ascending order

A launch ends wherever all programs need a result of all others; nothing else would order them.
Only the first R of a ranking can matter, so no more are ever ordered: ``shortlist`` finds a score
that so many do not exceed, by narrowing an interval of scores, and ``rank`` compares what is left.

Scores are integers ("codes") that order as the float32 numbers they stand for do, the lowest
first: +inf stands for a NaN that was computed, and ABSENT, above every number, for a position that
is not in the ranking. Ties go to the lowest position, and lists are ascending by position, so the
order inside a list decides them.

No kernel uses atomics or reads what another program of its launch writes, so results do not
depend on scheduling. A sum over channels is taken in the same order for every position, whatever
the batch and the length, so equal tokens have equal scores.

Torch finds out which arguments a kernel writes by following the address of each store back to the
nearest load. It takes a helper function that loads for one that writes, copies what it is given,
and orders everything else around it; so all loads stand in the kernels' own bodies.

S and all counts are run-time arguments and loops go over tiles of fixed size: one compilation
serves every prompt length. Counts fit 32 bits, but a compiler that cannot prove it passes 64, which
the loops would not accept; so each kernel narrows them. Offsets in memory are 64 bits wherever they
can exceed 32. Rows of the batch are the grid's first dimension, the only one without a limit of
65,535.

A row's plan is PLAN numbers, int32: n_image and n_text, the pivots of either kind; how many more
tokens than the image pivots it keeps; and how many of its pads, the lowest, go.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["PLAN", "code_of", "cosines", "key_norms", "rank", "select", "shortlist"]

PLAN = tl.constexpr(4)
ABSENT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def code_of(score, member):
    """The integer that orders as ``score`` (float32) does; ABSENT where it is no member."""
    score = tl.where(score == score, score, float("inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is no less than 0.0
    bits = score.to(tl.int32, bitcast=True)
    # Negative numbers order the other way round, all bits but the sign.
    return tl.where(member, bits ^ ((bits >> 31) & 0x7FFFFFFF), ABSENT)


@triton.jit
def _wanted(rest, pivots, turn):
    """How many of its ranking the pivot at ``turn`` can come to: its quota, and all before it."""
    share = rest // pivots
    return share * (turn + 1) + tl.minimum(turn + 1, rest - share * pivots)


@triton.jit(do_not_specialize=["S", "length", "retain"])
def key_norms(
    keys_ptr,  # [B, H, S, Dh], any strides
    vision_ptr,  # [B, S] bool
    valid_ptr,  # [B, S] bool, not read without HAS_VALID
    codes_ptr,  # out [B, 2, S] int32
    plan_ptr,  # out [B, PLAN] int32
    fits_ptr,  # out [B] bool: the row's text and budget fit into length
    S,
    length,
    retain,  # min(R, N)
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    CHANNELS: tl.constexpr,  # H * Dh
    HEAD: tl.constexpr,  # Dh
    HAS_VALID: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Minus the L1 key norm of each position that can be a pivot; and the row's plan.

    codes[:, 0] ranks vision tokens, codes[:, 1] text after the row's last vision token.
    Reads: H * Dh keys of each of these positions, once; the masks; and from each text position
    on, the rest of the vision mask (one byte per position). Programs: BLOCK_S positions each, few,
    so that a single short prompt already fills the device. The row's first program also reads both
    masks and makes the plan, while the others still read keys.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    length = tl.cast(length, tl.int32)
    retain = tl.cast(retain, tl.int32)
    vision_ptr += b * S
    valid_ptr += b * S
    start = tl.program_id(1) * BLOCK_S
    at = start + tl.arange(0, BLOCK_S)
    inside = at < S
    vision = tl.load(vision_ptr + at, mask=inside, other=0) != 0
    text = inside & (vision == 0)
    if HAS_VALID:
        text = text & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)

    lane = tl.arange(0, SCAN)
    if tl.max(text.to(tl.int32), 0) > 0:
        last = tl.full([SCAN], -1, tl.int32)
        for first in range(start, S, SCAN):
            position = first + lane
            marked = tl.load(vision_ptr + position, mask=position < S, other=0) != 0
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
    codes_ptr += b * 2 * S
    tl.store(codes_ptr + at, code_of(-norm, vision), mask=inside)
    tl.store(codes_ptr + S + at, code_of(-norm, text), mask=inside)

    # The batch rule (see batch_rule.py).
    if start == 0:
        n_vision = tl.full([], 0, tl.int32)
        n_text = tl.full([], 0, tl.int32)
        after = tl.full([], 0, tl.int32)  # the text behind all vision tokens so far
        for first in range(0, S, SCAN):
            position = first + lane
            marked = tl.load(vision_ptr + position, mask=position < S, other=0) != 0
            words = (position < S) & (marked == 0)
            if HAS_VALID:
                words &= tl.load(valid_ptr + position, mask=position < S, other=0) != 0
            newest = tl.max(tl.where(marked, position, -1), 0)
            behind = tl.sum((words & (position > newest)).to(tl.int32), 0)
            after = tl.where(newest < 0, after, 0) + behind
            n_vision += tl.sum(marked.to(tl.int32), 0)
            n_text += tl.sum(words.to(tl.int32), 0)
        budget = tl.minimum(n_vision, tl.maximum(retain, n_vision + length - S))
        n_image = tl.minimum(budget, IMAGE)
        plan_ptr += b * PLAN
        tl.store(plan_ptr, n_image)
        tl.store(plan_ptr + 1, tl.minimum(after, TEXT))
        tl.store(plan_ptr + 2, budget - n_image)
        tl.store(plan_ptr + 3, (S - n_vision - n_text) - (length - n_text - budget))
        tl.store(fits_ptr + b, n_text + budget <= length)


@triton.jit
def _raised(low, below, probe, count, wanted):
    """The interval's lower end and its count, once ``count`` lie at or below ``probe``."""
    few = count < wanted
    return tl.where(few, probe, low), tl.where(few, count, below)


@triton.jit
def _lowered(high, reached, probe, count, wanted):
    """The interval's upper end and its count."""
    enough = count >= wanted
    return tl.where(enough, probe, high), tl.where(enough, count, reached)


@triton.jit(do_not_specialize=["S", "capacity"])
def shortlist(
    codes_ptr,  # [B, L, S] int32
    plan_ptr,  # [B, PLAN] int32
    listed_ptr,  # out [B, L, capacity] int32: positions, ascending
    listed_codes_ptr,  # out [B, L, capacity] int32, not written for PIVOTS
    counts_ptr,  # out [B, L] int32: how many are listed
    S,
    capacity,
    PIVOTS: tl.constexpr,  # whether the rankings are those of the pivots, or by pivot
    BLOCK: tl.constexpr,
):
    """The first ``wanted`` of each ranking, by position: exactly so many for PIVOTS.

    Others may get up to an eighth more, which ``rank`` orders too: to divide the last few would
    take more passes. An interval (low, high] of codes is narrowed until at least ``wanted``
    positions and no more than that lie at or below ``high``; where equal codes do not let it, the
    lowest positions are taken. Each pass over the codes leaves a quarter of the interval: at most
    16 passes, 4 to 7 for the cosines of random tokens. Reads: 4 bytes per position and pass, and
    twice more, from cache. Programs: one for each ranking, large.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    capacity = tl.cast(capacity, tl.int32)
    ranking = b * tl.num_programs(1) + tl.program_id(1)
    turn = tl.program_id(1)
    n_image = tl.load(plan_ptr + b * PLAN)
    n_text = tl.load(plan_ptr + b * PLAN + 1)
    if PIVOTS:
        wanted = tl.where(turn == 0, n_image, n_text)
        limit = wanted
    else:
        rest = tl.load(plan_ptr + b * PLAN + 2)
        # A row without any pivot has a ranking by key norm in place of the first.
        pivots = tl.maximum(n_image + n_text, 1)
        wanted = tl.where(turn < pivots, _wanted(rest, pivots, turn), 0)
        limit = tl.minimum(wanted + wanted // 8, capacity)
    codes_ptr += ranking * S
    listed_ptr += ranking * capacity
    listed_codes_ptr += ranking * capacity
    lane = tl.arange(0, BLOCK)
    written = tl.full([], 0, tl.int32)
    if wanted > 0:
        lowest = tl.full([BLOCK], ABSENT, tl.int32)
        highest = tl.full([BLOCK], -ABSENT, tl.int32)
        members = tl.full([BLOCK], 0, tl.int32)
        for first in range(0, S, BLOCK):
            code = tl.load(codes_ptr + first + lane, mask=first + lane < S, other=ABSENT)
            member = code != ABSENT
            lowest = tl.minimum(lowest, code)
            highest = tl.maximum(highest, tl.where(member, code, -ABSENT))
            members += member.to(tl.int32)
        # 64 bits, because the interval may be longer than 32 can say.
        low = tl.min(lowest, 0).to(tl.int64) - 1
        high = tl.max(highest, 0).to(tl.int64)
        below = tl.full([], 0, tl.int32)  # at or below low: fewer than wanted
        reached = tl.sum(members, 0)  # at or below high: wanted or more
        while (reached > limit) & (high - low > 1):
            first_quarter = low + (high - low) // 4
            half = low + (high - low) // 2
            last_quarter = half + (high - half) // 2
            in_first = tl.zeros([BLOCK], tl.int32)
            in_half = tl.zeros([BLOCK], tl.int32)
            in_three = tl.zeros([BLOCK], tl.int32)
            for first in range(0, S, BLOCK):
                code = tl.load(codes_ptr + first + lane, mask=first + lane < S, other=ABSENT)
                in_first += (code <= first_quarter.to(tl.int32)).to(tl.int32)
                in_half += (code <= half.to(tl.int32)).to(tl.int32)
                in_three += (code <= last_quarter.to(tl.int32)).to(tl.int32)
            # Three counts of 16 bits, so that one reduction, with its barriers, adds them all up.
            packed = in_first.to(tl.int64) + (in_half.to(tl.int64) << 16)
            counts = tl.sum(packed + (in_three.to(tl.int64) << 32), 0)
            a = (counts & 0xFFFF).to(tl.int32)
            h = ((counts >> 16) & 0xFFFF).to(tl.int32)
            z = (counts >> 32).to(tl.int32)
            low, below = _raised(low, below, first_quarter, a, wanted)
            low, below = _raised(low, below, half, h, wanted)
            low, below = _raised(low, below, last_quarter, z, wanted)
            high, reached = _lowered(high, reached, last_quarter, z, wanted)
            high, reached = _lowered(high, reached, half, h, wanted)
            high, reached = _lowered(high, reached, first_quarter, a, wanted)
        top = high.to(tl.int32)
        allowed = tl.where(reached > limit, wanted, reached) - below
        ties = tl.full([], 0, tl.int32)
        for first in range(0, S, BLOCK):
            at = first + lane
            code = tl.load(codes_ptr + at, mask=at < S, other=ABSENT)
            tie = (code == top).to(tl.int32)
            taken = (code < top) | ((tie == 1) & (ties + tl.cumsum(tie, 0) <= allowed))
            target = written + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(listed_ptr + target, at, mask=taken)
            if not PIVOTS:
                tl.store(listed_codes_ptr + target, code, mask=taken)
            ties += tl.sum(tie, 0)
            written += tl.sum(taken.to(tl.int32), 0)
    tl.store(counts_ptr + ranking, written)


@triton.jit(do_not_specialize=["S"])
def cosines(
    hidden_ptr,  # [B, S, D], any strides
    vision_ptr,  # [B, S] bool
    norms_ptr,  # [B, 2, S] int32, the codes of key_norms
    plan_ptr,  # [B, PLAN] int32
    pivots_ptr,  # [B, 2, CAPACITY] int32
    codes_ptr,  # out [B, SLOTS, S] int32
    ranks_ptr,  # out [B, S, SLOTS] int32: ABSENT, for rank to fill in
    S,
    stride_b,
    stride_s,
    stride_d,
    D: tl.constexpr,  # 0 if no row can have a pivot
    SLOTS: tl.constexpr,  # image and text pivots, at least 1
    CAPACITY: tl.constexpr,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,  # whether the matrix units take the operands as they are
    COLUMNS: tl.constexpr,  # power of two, at least SLOTS
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Cosine similarity of each vision token, but the image pivots, to each pivot.

    Pivots are numbered in ascending position, the order of their turns. Products of half precision
    are exact on the matrix units, which may cut off a sum where float32 rounds it; so they add up
    BLOCK_D channels only, and float32 the rest: no more roundings than in a blocked sum of float32.
    Reads: D values of each vision token once per BLOCK_P pivots (the default 8 pivots: once), and
    of BLOCK_P pivots in every program, from cache.
    """
    b = tl.program_id(0).to(tl.int64)
    S = tl.cast(S, tl.int32)
    at = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = at < S
    vision = tl.load(vision_ptr + b * S + at, mask=inside, other=0) != 0
    n_image = tl.load(plan_ptr + b * PLAN)
    pivots = n_image + tl.load(plan_ptr + b * PLAN + 1)
    pivots_ptr += b * 2 * CAPACITY
    column = tl.arange(0, COLUMNS)
    image_pivot = tl.load(pivots_ptr + column, mask=column < n_image, other=-1)
    member = vision & (tl.max((at[:, None] == image_pivot[None, :]).to(tl.int32), 1) == 0)

    slot = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    entry = tl.where(slot < n_image, slot, CAPACITY + slot - n_image)
    pivot = tl.load(pivots_ptr + entry, mask=slot < pivots, other=-1)

    hidden_ptr += b * stride_b
    row = hidden_ptr + at[:, None].to(tl.int64) * stride_s
    pivot_row = hidden_ptr + pivot[:, None].to(tl.int64) * stride_s
    dots = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    one = tl.full([BLOCK_S, BLOCK_P], 1.0, tl.float32)
    squares = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    pivot_squares = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=4):
        d = first + tl.arange(0, BLOCK_D)
        offset = d[None, :].to(tl.int64) * stride_d
        channel = (d < D)[None, :]
        x = tl.load(row + offset, mask=vision[:, None] & channel, other=0.0)
        y = tl.load(pivot_row + offset, mask=(pivot >= 0)[:, None] & channel, other=0.0)
        wide = x.to(tl.float32)
        pivot_wide = y.to(tl.float32)
        if NARROW:
            part = tl.dot(x, tl.trans(y))
        else:
            part = tl.dot(wide, tl.trans(pivot_wide), input_precision="ieee")
        # Not +, which the compiler would fold into one sum over all channels in the matrix unit.
        dots = tl.fma(part, one, dots)
        squares += wide * wide
        pivot_squares += pivot_wide * pivot_wide
    norms = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), EPS)
    pivot_norms = tl.maximum(tl.sqrt_rn(tl.sum(pivot_squares, 1)), EPS)
    score = tl.div_rn(dots, norms[:, None] * pivot_norms[None, :])
    code = code_of(score, member[:, None] & (pivot >= 0)[None, :])
    if pivots == 0:  # a row without any keeps its largest key norms
        by_norm = tl.load(norms_ptr + b * 2 * S + at, mask=inside, other=ABSENT)
        code = tl.where((slot == 0)[None, :], by_norm[:, None], ABSENT)
    live = inside[:, None] & (slot < SLOTS)[None, :]
    tl.store(codes_ptr + (b * SLOTS + slot)[None, :] * S + at[:, None], code, mask=live)
    absent = tl.full([BLOCK_S, BLOCK_P], ABSENT, tl.int32)
    tl.store(ranks_ptr + (b * S + at)[:, None] * SLOTS + slot[None, :], absent, mask=live)


@triton.jit(do_not_specialize=["S", "capacity"])
def rank(
    listed_ptr,  # [B, SLOTS, capacity] int32
    codes_ptr,  # [B, SLOTS, capacity] int32
    counts_ptr,  # [B, SLOTS] int32
    ranks_ptr,  # out [B, S, SLOTS] int32, written for what is listed
    order_ptr,  # out [B, SLOTS, capacity] int32: the listed positions by rank
    S,
    capacity,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,  # a multiple of BLOCK
):
    """Ranks of the listed positions, by counting who is ahead.

    Counting takes as many comparisons per position as there are others where a sort would take
    their logarithm, but they are independent of each other: no barrier, and a program for every
    BLOCK positions of every list. Reads: 4 bytes per position, count / BLOCK times, from cache.
    Before and after the tile of OTHERS positions that holds a position, a tie is decided by the
    tile.
    """
    b = tl.program_id(0).to(tl.int64)
    rankings = tl.num_programs(1)
    ranking = b * rankings + tl.program_id(1)
    count = tl.load(counts_ptr + ranking)
    start = tl.program_id(2) * BLOCK
    if start < count:
        codes_ptr += ranking * capacity
        lane = tl.arange(0, OTHERS)
        place = start + tl.arange(0, BLOCK)
        mine = tl.load(codes_ptr + place, mask=place < count, other=ABSENT)
        at = tl.load(listed_ptr + ranking * capacity + place, mask=place < count, other=0)
        ahead = tl.zeros([BLOCK, OTHERS], tl.int32)
        own = start // OTHERS * OTHERS
        for first in range(0, own, OTHERS):
            other = tl.load(codes_ptr + first + lane)
            ahead += (other[None, :] <= mine[:, None]).to(tl.int32)
        other = tl.load(codes_ptr + own + lane, mask=own + lane < count, other=ABSENT)
        tie = (other[None, :] == mine[:, None]) & ((own + lane)[None, :] < place[:, None])
        ahead += ((other[None, :] < mine[:, None]) | tie).to(tl.int32)
        for first in range(own + OTHERS, count, OTHERS):
            other = tl.load(codes_ptr + first + lane, mask=first + lane < count, other=ABSENT)
            ahead += (other[None, :] < mine[:, None]).to(tl.int32)
        ranked = tl.sum(ahead, 1)
        # One after the other for each position, because `select` reads them together.
        rank_at = (b * S + at) * rankings + tl.program_id(1)
        tl.store(ranks_ptr + rank_at, ranked, mask=place < count)
        tl.store(order_ptr + ranking * capacity + ranked, at, mask=place < count)


@triton.jit
def _picked(ranks, bounds):
    """Whether one of the ranks [BLOCK, COLUMNS] of a position is below the bound of its ranking."""
    return tl.max((ranks < bounds[None, :]).to(tl.int32), 1) == 1


@triton.jit(do_not_specialize=["S", "length"])
def select(
    vision_ptr,  # [B, S] bool
    valid_ptr,  # [B, S] bool, not read without HAS_VALID
    plan_ptr,  # [B, PLAN] int32
    pivots_ptr,  # [B, 2, CAPACITY] int32
    ranks_ptr,  # [B, S, SLOTS] int32
    order_ptr,  # [B, SLOTS, length] int32
    keep_ptr,  # out [B, length] int64
    S,
    length,
    SLOTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HAS_VALID: tl.constexpr,
    COLUMNS: tl.constexpr,  # power of two, at least SLOTS
    BLOCK: tl.constexpr,
    TURN: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The greedy rounds, and the kept ones of BLOCK positions, ascending.

    The rounds are sequential by their definition, and short. Every program of a row goes through
    them: it needs their result, and how many positions before its own are kept. State between
    rounds is one bound per pivot, in registers, so no barrier is needed. Reads: about
    quota / TURN tiles of each pivot's order with the ranks of those positions; the ranks of its
    own positions; the masks up to these.
    """
    S = tl.cast(S, tl.int32)
    length = tl.cast(length, tl.int32)
    b = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    vision_ptr += b * S
    valid_ptr += b * S
    ranks_ptr += b * S * SLOTS
    order_ptr += b * SLOTS * length
    keep_ptr += b * length
    n_image = tl.load(plan_ptr + b * PLAN)
    pivots = tl.maximum(n_image + tl.load(plan_ptr + b * PLAN + 1), 1)
    rest = tl.load(plan_ptr + b * PLAN + 2)
    pads_dropped = tl.load(plan_ptr + b * PLAN + 3)
    column = tl.arange(0, COLUMNS)
    image = column < n_image
    image_pivot = tl.load(pivots_ptr + b * 2 * CAPACITY + column, mask=image, other=S)

    # Each pivot, in ascending position, takes its quota of what is free. It takes all that is free
    # below some bound of its ranking, and what was not free there had been taken before: so what
    # lies below the bound of any pivot is kept, and of the rest only the image pivots.
    lane = tl.arange(0, TURN)
    bounds = tl.zeros([COLUMNS], tl.int32)
    before = tl.zeros([TURN], tl.int32)  # what is taken of the positions before start
    # What a pivot orders and which ranks that has depend on no round, so both are read two rounds
    # and one ahead: a round then waits for memory only where it needs more than TURN positions.
    slots = (column < SLOTS)[None, :]
    at = tl.load(order_ptr + lane, mask=lane < _wanted(rest, pivots, 0), other=-1)
    live = (at >= 0)[:, None] & slots
    ranks_at = ranks_ptr + at[:, None] * SLOTS + column[None, :]
    ranks = tl.load(ranks_at, mask=live, other=ABSENT)
    more = lane < tl.where(pivots > 1, _wanted(rest, pivots, 1), 0)
    at_next = tl.load(order_ptr + length + lane, mask=more, other=-1)
    for turn in range(pivots):
        more = lane < tl.where(turn + 2 < pivots, _wanted(rest, pivots, turn + 2), 0)
        at_later = tl.load(order_ptr + (turn + 2) * length + lane, mask=more, other=-1)
        live = (at_next >= 0)[:, None] & slots
        ranks_at = ranks_ptr + at_next[:, None] * SLOTS + column[None, :]
        ranks_next = tl.load(ranks_at, mask=live, other=ABSENT)
        wanted = _wanted(rest, pivots, turn)
        quota = wanted - _wanted(rest, pivots, turn - 1)
        free = (at >= 0) & (_picked(ranks, bounds) == 0)
        mine = free & (tl.cumsum(free.to(tl.int32), 0) <= quota)
        before += (mine & (at < start)).to(tl.int32)
        end = tl.max(tl.where(mine, lane + 1, 0), 0)
        taken = tl.sum(mine.to(tl.int32), 0)
        first = tl.full([], TURN, tl.int32)
        while (taken < quota) & (first < wanted):
            place = first + lane
            ranked = place < wanted
            at = tl.load(order_ptr + turn * length + place, mask=ranked, other=0)
            ranks_at = ranks_ptr + at[:, None] * SLOTS + column[None, :]
            ranks = tl.load(ranks_at, mask=ranked[:, None] & slots, other=ABSENT)
            free = ranked & (_picked(ranks, bounds) == 0)
            mine = free & (taken + tl.cumsum(free.to(tl.int32), 0) <= quota)
            before += (mine & (at < start)).to(tl.int32)
            end = tl.maximum(end, tl.max(tl.where(mine, place + 1, 0), 0))
            taken += tl.sum(mine.to(tl.int32), 0)
            first += TURN
        bounds = tl.where(column == turn, end, bounds)
        at = at_next
        ranks = ranks_next
        at_next = at_later
    kept = tl.sum(before, 0) + tl.sum((image & (image_pivot < start)).to(tl.int32), 0)

    # All text before these positions is kept, and of the pads all but the lowest.
    scan = tl.arange(0, SCAN)
    text_seen = tl.zeros([SCAN], tl.int32)
    pads_seen = tl.zeros([SCAN], tl.int32)
    for first in range(0, start, SCAN):
        inside = first + scan < start
        text = inside & (tl.load(vision_ptr + first + scan, mask=inside, other=0) == 0)
        if HAS_VALID:
            valid = tl.load(valid_ptr + first + scan, mask=inside, other=0) != 0
            pads_seen += (text & (valid == 0)).to(tl.int32)
            text = text & valid
        text_seen += text.to(tl.int32)
    pads = tl.sum(pads_seen, 0)
    kept += tl.sum(text_seen, 0) + tl.maximum(pads - pads_dropped, 0)

    at = start + tl.arange(0, BLOCK)
    inside = at < S
    vision = tl.load(vision_ptr + at, mask=inside, other=0) != 0
    live = vision[:, None] & (column < SLOTS)[None, :]
    ranks = tl.load(ranks_ptr + at[:, None] * SLOTS + column[None, :], mask=live, other=ABSENT)
    pivotal = tl.max((at[:, None] == image_pivot[None, :]).to(tl.int32), 1) == 1
    stays = vision & (pivotal | _picked(ranks, bounds))
    text = inside & (vision == 0)
    if HAS_VALID:
        valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0
        pad = (text & (valid == 0)).to(tl.int32)
        text = text & valid
        stays = stays | ((pad == 1) & (pads + tl.cumsum(pad, 0) > pads_dropped))
    stays = stays | text
    target = kept + tl.cumsum(stays.to(tl.int32), 0) - 1
    # A row that does not fit keeps more than length, and raises.
    tl.store(keep_ptr + target, at.to(tl.int64), mask=stays & (target < length))
