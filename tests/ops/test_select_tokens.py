"""The selection operator against the float64 oracle, alone and in batches; its arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dartfx.errors import ConfigError, KernelUnavailableError, SelectionError
from dartfx.ops import select_tokens
from dartfx.selection import dart
from dartfx.tools.zoo import oracle
from tests.support.selection_cases import (
    draw,
    expected,
    losing_text,
    one_hot,
    operator,
    plain,
    ragged,
)

# Rounding of a float32 sum of up to a few hundred terms, with a wide margin. A decision made by
# less than this in float64 may fall either way in float32.
MIN_GAP = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    decided = 0
    for seed in range(40):
        case = draw(seed, dtype=dtype)
        want = expected(case)
        got = select_tokens(**case)
        assert got.dtype == torch.int64
        if want.gap > (MIN_GAP if dtype != torch.float64 else 1e-12):
            assert got.tolist() == want.keep_idx, seed
            decided += 1
        else:
            assert got.shape == (len(want.keep_idx), len(want.keep_idx[0]))
            assert bool((got.diff(dim=1) > 0).all())
    # Narrow dtypes have exact ties in short vectors, which float32 need not reproduce.
    assert decided >= 20


@pytest.mark.parametrize(("S", "retain"), [(577, 64), (640, 128), (640, 192)])
def test_agrees_with_the_oracle_at_full_size(S: int, retain: int) -> None:
    case = plain(S=S, first=1, N=S - 37, retain=retain)
    want = expected(case)
    assert want.gap > 1e-7
    assert select_tokens(**case).tolist() == want.keep_idx


def test_ties_go_to_the_lowest_position() -> None:
    for seed in range(60):
        case = one_hot(seed)
        assert select_tokens(**case).tolist() == expected(case).keep_idx, seed


def test_duplicates_of_a_pivot_go_first() -> None:
    """Clusters of identical vision tokens: the picks of a pivot avoid its own cluster."""
    case = plain(N=24, retain=5)
    case["hidden"] = torch.zeros(1, 40, 3)
    case["hidden"][0, 5:25, 0] = 1.0  # 20 copies of one vector
    case["hidden"][0, 25:29, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # four of another direction
    case["keys"][0, :, 5] = 100.0  # the pivot is a copy
    got = select_tokens(**case, pivot_image_tokens=1, pivot_text_tokens=0)
    assert [p for p in got[0].tolist() if 5 <= p < 29] == [5, 25, 26, 27, 28]
    pivots = {"pivot_image_tokens": 1, "pivot_text_tokens": 0}
    assert got.tolist() == expected({**case, **pivots}).keep_idx


@pytest.mark.parametrize("retain", [0, 1, 3, 4, 5, 23, 24, 30])
@pytest.mark.parametrize("after", [0, 2, 11])
@pytest.mark.parametrize("pivots", [(4, 4), (0, 4), (4, 0), (0, 0), (30, 30)])
def test_budget_and_pivot_limits(retain: int, after: int, pivots: tuple[int, int]) -> None:
    case = plain(S=29 + after, retain=retain)
    case["pivot_image_tokens"], case["pivot_text_tokens"] = pivots
    got = select_tokens(**case)
    assert got.shape == (1, 29 + after - 24 + min(retain, 24))
    assert got.tolist() == expected(case).keep_idx


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", [[10, 20, 15], [20, 10], [1, 30, 2], [0, 12]])
@pytest.mark.parametrize("retain", [0, 1, 6, 12])
def test_rows_with_unequal_vision_tokens(side: str, counts: list[int], retain: int) -> None:
    case = {**ragged(counts, [0] * len(counts), 7, side), "retain": retain}
    want = expected(case)
    assert want.gap > MIN_GAP
    got = select_tokens(**case)
    assert got.tolist() == want.keep_idx
    for b in range(len(counts)):
        words = case["valid_mask"][b] & ~case["vision_mask"][b]
        assert set(torch.nonzero(words)[:, 0].tolist()) <= set(got[b].tolist())


@pytest.mark.parametrize("pads", [0, 1, 17])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_selects_the_same_alone_padded_and_batched(pads: int, side: str) -> None:
    alone = plain(S=60, N=40, retain=13)
    vision_alone = alone["vision_mask"][0]
    kept_alone = [p for p in select_tokens(**alone)[0].tolist() if vision_alone[p]]
    size, offset = 60 + pads, pads if side == "left" else 0
    case = plain(B=3, S=size, first=offset + 5, N=40, retain=13)
    case["valid_mask"] = torch.ones(3, size, dtype=torch.bool)
    case["valid_mask"][1] = False
    case["valid_mask"][1, offset : offset + 60] = True
    case["hidden"][1, offset : offset + 60] = alone["hidden"][0]
    case["keys"][1, :, offset : offset + 60] = alone["keys"][0]
    got = select_tokens(**case)[1].tolist()
    assert [p - offset for p in got if case["vision_mask"][1, p]] == kept_alone
    pad_positions = [p for p in range(size) if not case["valid_mask"][1, p]]
    assert [p for p in got if p in pad_positions] == pad_positions


def test_every_pivot_finds_what_was_dropped_at_least_as_similar() -> None:
    """Each dropped token is at least as similar to each pivot as that pivot's own picks."""
    for seed in range(20):
        case = draw(seed, S=80, B=1, dtype=torch.float64)
        kept = set(select_tokens(**case)[0].tolist())
        row, hidden = expected(case).rows[0], oracle.as_float64(case["hidden"])[0]
        dropped = [p for p in range(80) if case["vision_mask"][0, p] and p not in kept]
        assert kept >= set(row.kept)
        for pivot, picks in row.picks:
            worst = max((oracle.cosine(hidden[pivot], hidden[x]) for x in picks), default=-2.0)
            for x in dropped:
                assert oracle.cosine(hidden[pivot], hidden[x]) >= worst - 1e-12


@pytest.mark.parametrize("where", ["hidden", "keys"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
def test_nan_ranks_last(where: str, value: float) -> None:
    case = plain(retain=9)
    at = (0, slice(5, 20)) if where == "hidden" else (0, slice(None), slice(5, 20))
    case[where][at] = value
    got = select_tokens(**case)
    assert got.shape == (1, 25)
    assert bool((got.diff(dim=1) > 0).all())
    if np.isnan(value):
        assert got.tolist() == expected(case).keep_idx
    case[where][:] = value
    assert bool((select_tokens(**case).diff(dim=1) > 0).all())


def test_nan_tokens_are_not_kept_while_others_are_left() -> None:
    case = {**plain(retain=9), "pivot_text_tokens": 0}
    case["keys"][0, :, 25:29] = 100.0  # the pivots are numbers
    case["hidden"][0, 5:20] = float("nan")
    assert [p for p in select_tokens(**case)[0].tolist() if 5 <= p < 29] == list(range(20, 29))
    case["keys"][0, :, 20:29] = float("nan")
    assert select_tokens(**case).tolist() == expected(case).keep_idx


def test_the_users_precision_settings_do_not_matter() -> None:
    case = plain(B=2)
    want = select_tokens(**case)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_tokens(**case), want)
        assert torch.equal(torch.compile(operator, backend="aot_eager")({**case, "N": 24}), want)


def test_public_call_names_the_row_that_would_lose_text() -> None:
    case = losing_text()
    del case["N"]
    with pytest.raises(SelectionError, match="no room for the text of row 1: 155 valid"):
        select_tokens(**case)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden": torch.randn(40, 16)}, r"hidden must be \[B, S, D\], got shape \(40, 16\)"),
    ({"hidden": torch.randn(0, 40, 16)}, "hidden must hold at least one row"),
    ({"hidden": torch.ones(1, 40, 16, dtype=torch.int64)}, "hidden must be a floating-point"),
    ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
    ({"keys": torch.randn(1, 40, 8)}, r"keys must be \[B, H, S, Dh\]"),
    ({"keys": torch.randn(1, 40, 2, 8)}, "keys must be .* with B = 1 and S = 40"),
    ({"keys": torch.empty(1, 2, 40, 8, device="meta")}, "keys is on meta, but hidden is on cpu"),
    ({"vision_mask": torch.ones(1, 40)}, "vision_mask must be a bool tensor, got torch.float32"),
    ({"vision_mask": None}, "vision_mask must be a bool tensor, got NoneType"),
    ({"vision_mask": torch.ones(1, 41, dtype=torch.bool)}, r"vision_mask must be .*\(1, 40\)"),
    ({"vision_mask": torch.zeros(1, 40, dtype=torch.bool)}, "vision_mask marks no vision token"),
    ({"valid_mask": torch.ones(1, 40)}, "valid_mask must be a bool tensor"),
    ({"valid_mask": torch.ones(2, 40, dtype=torch.bool)}, r"valid_mask must be .*\(1, 40\)"),
    ({"valid_mask": torch.zeros(1, 40, dtype=torch.bool)}, "False at 24 vision tokens of row 0"),
    ({"retain": -1}, "retain must be at least 0, got -1"),
    ({"retain": 2.0}, "retain must be an int, got float"),
    ({"retain": True}, "retain must be an int, got bool"),
    ({"pivot_image_tokens": -2}, "pivot_image_tokens must be at least 0, got -2"),
    ({"pivot_text_tokens": "4"}, "pivot_text_tokens must be an int, got str"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odd", [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("sign", [1, -1])
def test_only_the_first_of_each_order_matter(sign: int, odd: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for rows, takers, positions, most in [(3, 4, 50, 4), (2, 8, 20, 9), (1, 1, 7, 2), (2, 3, 9, 1)]:
        shape = rows, takers, positions
        likeness = torch.randint(3, shape, generator=generator).to(dtype) * sign
        likeness[torch.rand(shape, generator=generator) < 0.3] = odd
        vision, pivots = torch.rand(2, rows, positions, generator=generator) < 0.6
        quota = torch.randint(most, (rows, takers), generator=generator)
        kept = dart.take_least_alike(likeness, vision, vision & pivots, quota)
        rest = vision & ~pivots
        taken = dart.take_in_turn(dart.stable_order(likeness), rest, quota)
        assert torch.equal(kept, vision & pivots | taken)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select_tokens(**{**plain(), **change})


def test_kernel_names() -> None:
    case = plain()
    assert torch.equal(select_tokens(**case, kernel="torch"), select_tokens(**case))
    with pytest.raises(KernelUnavailableError, match="use kernel='auto' or 'torch'"):
        select_tokens(**case, kernel="triton")
    with pytest.raises(ConfigError, match="unknown kernel 'cuda'; valid names: 'auto'"):
        select_tokens(**case, kernel="cuda")
