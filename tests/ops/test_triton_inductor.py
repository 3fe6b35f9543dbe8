"""Inductor's code for the kernels on a CUDA device, tested without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# The stub replaces private functions of torch; with another version it would fail on its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.__version__.startswith("2.13."), reason="the stub device is for torch 2.13"
    ),
]

PROGRAM = Path(__file__).parents[1] / "support/processes/cuda_codegen.py"


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_kernels_are_launched_by_the_generated_code(shapes: str) -> None:
    """In order, in Inductor's buffers, without copies; the gather is fused with the next norm."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), shapes],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launched = re.findall(r"^ +(\w+?)(?:_\d+)?\.run\(", done.stdout, re.MULTILINE)
    norm = "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt"
    assert launched[-1].startswith("triton_red_fused_")
    assert {"gather", "mean", "rsqrt"} <= set(launched[-1].split("_"))
    assert launched[:-1] == [
        *("triton_poi_fused_mul", "key_norms", "shortlist", norm, "cosines"),
        *("shortlist", "rank", "select"),
    ]
    (guards,) = re.findall(r"^# guards: (.*)$", done.stdout, re.MULTILINE)
    # One compilation for all lengths up to the kernels' limit.
    assert re.fullmatch(r"\[\]" if shapes == "static" else r"\['\w+ <= 32768'\]", guards)
