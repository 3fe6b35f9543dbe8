"""``bench generate --profile``: its arithmetic, which needs no GPU."""

from __future__ import annotations

import pytest

from dartfx.cli.main import main
from dartfx.tools.bench.generate.kernels import Kernel, profile_table, summary

MICRO = 1e-6


def test_busy_and_idle_time_add_up() -> None:
    kernels = [
        Kernel(50, 60, "b"),
        Kernel(10, 30, "a"),
        Kernel(20, 25, "copy"),
        Kernel(30, 40, "a"),
    ]
    found = summary(kernels, start=2)
    assert found["kernels"] == 4
    assert found["before_first"] == pytest.approx(8 * MICRO)
    assert found["busy"] == pytest.approx(40 * MICRO)
    assert found["between"] == pytest.approx(10 * MICRO)
    assert found["longest_gaps"] == [[pytest.approx(10 * MICRO), "a", "b"]]
    assert [each[:2] for each in found["top"]] == [["a", 2], ["b", 1], ["copy", 1]]


def test_the_table_holds_every_row() -> None:
    row = {"seconds": 0.03, "launches": {"cudaLaunchKernel": 2}, "host": {"TorchDynamo": 1e-3}}
    row |= summary([Kernel(3, 5, "k")], start=1)
    text = profile_table({"dart": row, "plain": {"failed": "RuntimeError: no"}})
    assert "| dart | 30.00 | 1 | 2 | 0.00 | 0.00 | 0.00 |" in text
    assert "failed: RuntimeError: no" in text


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "--model-shape", "tiny", "--device", "cpu", "--profile"])
    assert "--device cuda" in capsys.readouterr().err
