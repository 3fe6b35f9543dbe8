"""The Triton kernels against the float64 oracle: on a GPU, and in Triton's interpreter.

``test_triton_interpreted.py`` runs this file in the interpreter, in a separate process because
Triton reads TRITON_INTERPRET on import.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dartfx.errors import KernelUnavailableError, SelectionError
from dartfx.ops import covering, select_tokens, triton_launch
from dartfx.ops.farthest import on_gpu
from dartfx.selection.cover import cover_by_steps
from dartfx.selection.spread import take_apart_by_steps
from tests.support.selection_cases import draw, expected, losing_text, one_hot, plain, ragged

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; test_triton_interpreted.py runs this file", allow_module_level=True)
pytestmark = [
    # Triton 3.6 converts arrays of one element to int, which numpy before 2.4 only warns about.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

# As in test_select_tokens.py: a closer decision may fall either way in float32.
MIN_GAP = 1e-5
ABSENT = 0x7FFFFFFF  # the code of a position outside a ranking


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated holds NaN, or the largest integer, until a kernel writes it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def selected(case: dict[str, Any]) -> Tensor:
    """What the kernels keep of ``case``, on the CPU."""
    there = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in case.items()}
    return select_tokens(**there, kernel="triton").cpu()


def check(case: dict[str, Any], min_gap: float = MIN_GAP) -> bool:
    """Whether the oracle's answer was clear-cut; the kernels must then give the same one."""
    want, got = expected(case), selected(case)
    assert got.dtype == torch.int64
    assert got.shape == (len(want.keep_idx), len(want.keep_idx[0]))
    assert bool((got.diff(dim=1) > 0).all())
    if want.gap <= min_gap:
        return False
    assert got.tolist() == want.keep_idx
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_batches(dtype: torch.dtype) -> None:
    """Padded, with several vision spans; 0 to 5 pivots of either kind."""
    assert sum(check(draw(seed, S=10 + 17 * seed, dtype=dtype)) for seed in range(5)) >= 3


@pytest.mark.parametrize("S", [1, 5, 123])
def test_sizes_that_fill_no_tile(S: int) -> None:
    assert check(plain(S=S, first=S // 4, N=max(1, S // 2), retain=S // 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image(dtype: torch.dtype) -> None:
    case = plain(S=577, first=1, N=540, retain=128)
    case = {**case, "hidden": case["hidden"].to(dtype), "keys": case["keys"].to(dtype)}
    assert check(case, min_gap=1e-7)


def test_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter needs a while for each tile. How large tiles are must not matter.
    monkeypatch.setattr(triton_launch, "_RANK_TILE", (64, 512))
    monkeypatch.setattr(triton_launch, "_NORM_TILE", (32, 32))
    monkeypatch.setattr(triton_launch, "_COSINE_TILE", (32, 32, 8))
    monkeypatch.setattr(triton_launch, "_SHORTLIST_TILE", 1024)
    assert check(plain(S=2929, first=35, N=2880, retain=640), min_gap=1e-8)


@pytest.mark.parametrize("wanted", [1, 37, 93])
def test_shortlists_hold_the_first_of_each_ranking(wanted: int) -> None:
    """Whatever the scale of the scores is, with ties and positions outside the ranking."""
    generator = torch.Generator().manual_seed(wanted)
    scores = torch.randn(2, 3, 300, generator=generator) * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    scores[1] = scores[1].sign() * torch.tensor([torch.inf, 0.0, 1.0])[:, None]
    bits = scores.view(torch.int32)
    codes = torch.where(scores == 0, 0, torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    codes[:, :, 5:20] = ABSENT
    plan = torch.tensor([[3, 0, 3 * wanted, 0], [3, 0, 3 * wanted, 0]], dtype=torch.int32)
    shortlist = triton_launch._shortlist(
        triton_launch._now, codes.to(DEVICE), plan.to(DEVICE), 280, PIVOTS=False
    )
    listed, listed_codes, counts = (x.cpu() for x in shortlist)
    order = codes.sort(dim=-1, stable=True).indices
    for b, turn in itertools.product(range(2), range(3)):
        needed = wanted * (turn + 1)
        count = int(counts[b, turn])
        assert needed <= count <= min(needed + needed // 8, 280)
        assert listed[b, turn, :count].tolist() == sorted(order[b, turn, :count].tolist())
        found = codes[b, turn][listed[b, turn, :count].long()]
        assert torch.equal(listed_codes[b, turn, :count], found)


def test_ties_go_to_the_lowest_position() -> None:
    for seed in range(6):
        case = one_hot(seed, S=90)
        assert selected(case).tolist() == expected(case).keep_idx, seed


def test_clusters_of_duplicates() -> None:
    case = plain(S=150, first=10, N=130, retain=40)
    original = torch.arange(130) % 7
    for part in (case["hidden"][0, 10:140], case["keys"][0, :, 10:140].transpose(0, 1)):
        part.copy_(part[original].clone())
    assert selected(case).tolist() == expected(case).keep_idx


@pytest.mark.parametrize("retain", [0, 1, 5, 24, 30])
@pytest.mark.parametrize(
    ("pivots", "after"), [((4, 4), 0), ((4, 4), 2), ((0, 4), 11), ((0, 4), 0), ((0, 0), 3)]
)
def test_budget_and_pivot_limits(retain: int, pivots: tuple[int, int], after: int) -> None:
    case = plain(S=29 + after, retain=retain)
    case["pivot_image_tokens"], case["pivot_text_tokens"] = pivots
    assert check(case)


@pytest.mark.parametrize("text", [0, 1, 3])
def test_more_pivots_than_positions_stay(text: int) -> None:
    case = plain(B=2, S=5 + text, first=1, N=4, retain=1)
    for case["pivot_image_tokens"], case["pivot_text_tokens"] in ((0, 9), (9, 9), (9, 0)):
        assert check(case)


@pytest.mark.parametrize("pivots", [(30, 30), (1, 12), (9, 0)])
def test_many_pivots(pivots: tuple[int, int]) -> None:
    case = plain(S=140, N=100, retain=70)
    case["pivot_image_tokens"], case["pivot_text_tokens"] = pivots
    assert check(case)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", [[10, 20, 15], [1, 30, 2], [0, 12]])
@pytest.mark.parametrize("retain", [0, 6])
def test_rows_with_unequal_vision_tokens(side: str, counts: list[int], retain: int) -> None:
    assert check({**ragged(counts, [0] * len(counts), 7, side), "retain": retain})


def test_padded_rows() -> None:
    assert check({**ragged([30, 30, 30], [0, 5, 40], 6), "retain": 11})


# The interpreter computes with numpy, which warns of inf * 0.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("where", ["hidden", "keys"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
def test_nan_ranks_last(where: str, value: float) -> None:
    case = plain(retain=9)
    case[where][(0, slice(5, 20)) if where == "hidden" else (0, slice(None), slice(5, 20))] = value
    assert selected(case).tolist() == select_tokens(**case).tolist()
    if value != float("inf"):
        assert selected(case).tolist() == expected(case).keep_idx
    case[where][:] = value
    assert selected(case).tolist() == select_tokens(**case).tolist()


def test_any_memory_layout() -> None:
    case = plain(B=2, S=60, N=40)
    want = expected(case).keep_idx
    case["keys"] = case["keys"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    case["hidden"] = torch.stack([case["hidden"], torch.zeros(2, 60, 16)], 3)[..., 0]
    case["vision_mask"] = case["vision_mask"][:1].expand(2, -1)
    assert not any(case[k].is_contiguous() for k in ("keys", "hidden", "vision_mask"))
    assert selected(case).tolist() == want


@pytest.mark.skipif(not INTERPRETED, reason="needs 8 GB, of which the CPU touches little")
def test_offsets_beyond_32_bits() -> None:
    case = plain(S=60, N=40)
    far = (1 << 31) // 15 + 1  # between channels, of which hidden has 16
    storage = torch.from_numpy(np.zeros(16 * far, np.float16))
    case["hidden"] = storage.as_strided((1, 60, 16), (0, 1, far)).copy_(case["hidden"])
    assert selected(case).tolist() == expected(case).keep_idx
    case = plain(S=60, N=40)
    far = (1 << 31) // 7 + 1  # and a head 8
    storage = torch.from_numpy(np.zeros(8 * far, np.float16))
    case["keys"] = storage.as_strided((1, 2, 60, 8), (0, 100, 1, far)).copy_(case["keys"])
    assert selected(case).tolist() == expected(case).keep_idx


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it ends the process: an assertion there")
def test_text_is_never_lost() -> None:
    case = losing_text()
    with pytest.raises(SelectionError, match="row 1 has more valid text than fits"):
        torch.ops.dartfx.select_tokens(
            *(case["hidden"], case["keys"], case["vision_mask"], None),
            *(case["N"], case["retain"], 4, 4, "dart", "triton"),
        )


def test_a_row_that_does_not_fit_is_safe_to_gather_with() -> None:
    """Where the error is an assertion on the device, later kernels may run before it is noticed."""
    case = losing_text()
    tensors = [case[k].to(DEVICE) for k in ("hidden", "keys", "vision_mask")]
    pivots = {"pivot_image_tokens": 4, "pivot_text_tokens": 4}
    kept, fits = triton_launch.select(
        *tensors, None, case["N"], case["retain"], traced=False, **pivots
    )
    assert fits.tolist() == [True, False]
    assert 0 <= int(kept.min()) <= int(kept.max()) < 300


def test_farthest_points_are_those_of_the_plain_loop() -> None:
    """With rows of unequal budgets, equal tokens, and some that are no numbers."""
    for seed, (batch, sequence, width) in enumerate([(2, 21, 9), (1, 14, 40)]):
        generator = torch.Generator().manual_seed(seed)
        units = torch.randn(batch, sequence, width, generator=generator)
        units[:, ::7] = units[:, :1]
        units = torch.nn.functional.normalize(units, dim=-1)
        units[0, 3] = torch.nan
        first = torch.randn(batch, sequence, generator=generator)
        first[:, 5] = torch.nan
        members = torch.rand(batch, sequence, generator=generator) < 0.8
        budget = (members.sum(1) * torch.rand(batch, generator=generator)).long()
        budget[-1] = members[-1].sum()
        case = units, first, members, budget
        want = take_apart_by_steps(*case, int(budget.max()))
        assert want.sum(1).tolist() == budget.tolist()
        got = on_gpu(*(x.to(DEVICE) for x in case), int(budget.max()) + 1)
        assert torch.equal(got.cpu(), want), seed


def test_covering_keeps_what_the_plain_loop_keeps() -> None:
    """Of eighths, whose sums are exact: ties too, and stretches of unequal budgets and lengths."""
    for seed, (parts, length) in enumerate([(3, 21), (1, 140)]):
        generator = torch.Generator().manual_seed(seed)
        alike = torch.randint(-4, 9, (parts, length, length), generator=generator) / 8
        alike = torch.maximum(alike, alike.mT)
        alike[:, ::6] = alike[:, :1]
        weight = torch.randint(0, 5, (parts, length), generator=generator) / 4
        free = torch.arange(length) < torch.tensor([[length], [length - 5], [9]])[:parts]
        share = (free.sum(1, keepdim=True) * torch.rand(parts, 1, generator=generator)).long()
        share[-1] = min(9, int(free[-1].sum()))
        case, most = (alike, weight * free, free, share), int(share.max())
        want = cover_by_steps(*case, most)
        assert want.sum(1).tolist() == share[:, 0].tolist()
        got = covering.on_gpu(*(x.to(DEVICE) for x in case), most + 1)
        assert torch.equal(got.cpu(), want), seed


LONG = {
    "hidden": torch.ones(1, 32_769, 1),
    "keys": torch.ones(1, 1, 32_769, 1),
    "vision_mask": torch.ones(1, 32_769, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(1, 40, 16).double()}, "hidden is torch.float64, and the kernels"),
        ({"keys": torch.ones(1, 2, 40, 8).double()}, "keys is torch.float64, and the kernels"),
        (LONG, "hidden holds S = 32769 positions, and the limit is 32768"),
        ({"pivot_image_tokens": 61}, r"pivot_text_tokens is 65, and the limit is 64"),
        ({"selector": "uniform"}, "selector is 'uniform', and the kernels implement 'dart'"),
    ],
)
def test_what_the_kernels_do_not_serve_is_named(change: dict[str, Any], message: str) -> None:
    case = {**plain(), **change}
    with pytest.raises(KernelUnavailableError, match=message):
        selected(case)
    there = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in case.items()}
    assert torch.equal(select_tokens(**there), select_tokens(**there, kernel="torch"))
