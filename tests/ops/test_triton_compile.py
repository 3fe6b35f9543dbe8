"""The kernels compiled for absent devices: registers, spills, shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from dartfx.ops.covering.kernels import take_covering
from dartfx.ops.farthest.kernels import take_farthest
from tests.support.offline import Launch, Shape, Usage, usage

# Registers per thread and bytes of shared memory per program that a device can give.
TARGETS = [
    pytest.param(GPUTarget("cuda", 80, 32), Usage(255, 0, 163 * 1024), id="sm_80"),
    pytest.param(GPUTarget("cuda", 90, 32), Usage(255, 0, 227 * 1024), id="sm_90"),
    pytest.param(GPUTarget("hip", "gfx942", 64), Usage(512, 0, 64 * 1024), id="gfx942"),
]
SHAPES = {
    "heads32": Shape(S=640, H=32, D=4096),
    "gqa4": Shape(S=4096, H=4, D=3584, padded=True),
    "float32": Shape(S=2930, H=32, D=4096, dtype=torch.float32, padded=True),
    "float16": Shape(S=577, H=2, D=576, Dh=80, dtype=torch.float16, pivots=(1, 0)),
    "pivots16": Shape(S=640, H=8, D=2048, pivots=(10, 6), padded=True),
    "pivots64": Shape(S=640, H=8, D=2048, pivots=(32, 32), padded=True),
    "pivots0": Shape(S=640, H=8, D=2048, pivots=(0, 0)),
}


@pytest.fixture(autouse=True, scope="module")
def cold_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# Every device with one shape, and every shape with one device; the other pairs are slow.
PAIRS = [
    pytest.param(
        name,
        *target.values,
        id=f"{name}-{target.id}",
        marks=() if name == "heads32" or target.id == "sm_90" else pytest.mark.slow,
    )
    for name in SHAPES
    for target in TARGETS
]


@pytest.mark.parametrize(("name", "target", "limit"), PAIRS)
def test_kernels_fit_without_spilling(
    name: str, target: GPUTarget, limit: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = SHAPES[name].launches(monkeypatch)
    used = {one.kernel.__name__: usage(one.compile(target), target) for one in launches}
    assert set(used) == {"key_norms", "shortlist", "cosines", "rank", "select"}
    for kernel, what in used.items():
        assert what.spilled == 0, (kernel, what)
        assert 0 < what.registers <= limit.registers, (kernel, what)
        assert 0 < what.shared <= limit.shared, (kernel, what)


@pytest.mark.parametrize(("target", "limit"), TARGETS)
def test_a_step_of_farthest_points_fits(target: GPUTarget, limit: Usage) -> None:
    numbers = torch.empty(2, 2930, device="meta")
    mask, budget = numbers.bool(), torch.empty(2, dtype=torch.int64, device="meta")
    units, candidates = numbers[..., None].expand(-1, -1, 4096), budget.expand(2, 367, 2)
    arguments = units, mask, numbers, budget, numbers, candidates, mask, 2930, 367, 5
    constants = {"D": 4096, "BLOCK_S": 8, "BLOCK_D": 512, "SCAN": 512}
    used = usage(Launch(take_farthest, (2, 367), arguments, constants).compile(target), target)
    assert used.spilled == 0
    assert 0 < used.registers <= limit.registers


@pytest.mark.parametrize(("target", "limit"), TARGETS)
def test_a_step_of_covering_fits(target: GPUTarget, limit: Usage) -> None:
    weight = torch.empty(5, 576, device="meta")
    free, share = weight.bool(), torch.empty(5, dtype=torch.int64, device="meta")
    alike, covered = weight[..., None].expand(-1, -1, 576), weight.expand(2, -1, -1)
    candidates = share[:, None].expand(2, -1, 72)
    arguments = alike, weight, free, share, covered, candidates, free, 576, 72, 5
    constants = {"BLOCK_K": 8, "BLOCK_L": 128, "SCAN": 128}
    used = usage(Launch(take_covering, (5, 72), arguments, constants).compile(target), target)
    assert used.spilled == 0
    assert 0 < used.registers <= limit.registers


@pytest.mark.parametrize("counts", ["i64", "constexpr"])
@pytest.mark.parametrize("name", ["heads32", "gqa4"])
def test_kernels_take_counts_as_inductor_passes_them(
    name: str, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that it cannot bound is 64 bits wide, and one that is 1 a constant."""
    for one in SHAPES[name].launches(monkeypatch):
        assert one.compile(GPUTarget("cuda", 90, 32), counts).asm["cubin"]


def test_the_largest_grids_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 2 ** 31 - 1 programs in the first dimension and 65,535 in the others."""
    largest = Shape(S=32_768, H=1, D=1, Dh=1, pivots=(32, 32), B=70_000)
    for one in largest.launches(monkeypatch):
        assert one.grid[0] == 70_000
        assert all(size <= 65_535 for size in one.grid[1:])


# ptxas reports it for both CUDA targets, in 7 s.
@pytest.mark.parametrize(
    ("target", "limit"),
    [*TARGETS[1:], pytest.param(*TARGETS[0].values, id="sm_80", marks=pytest.mark.slow)],
)
def test_a_spill_would_be_seen(
    target: GPUTarget, limit: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = SHAPES["heads32"].launches(monkeypatch)[-1]
    select.constants.update(BLOCK=2048, num_warps=1)
    assert usage(select.compile(target), target).spilled > 0
