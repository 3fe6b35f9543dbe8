"""Runs ``test_triton.py`` in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


# Batches, ties and limits; the rest takes the interpreter a minute more.
FEW = (
    "random_batches or shortlists or ties or budget_and_pivot or farthest or covering "
    "or text_is_never_lost or not_serve"
)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(FEW, id="few"),
        pytest.param(f"not ({FEW})", id="rest", marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-k", chosen, str(Path(__file__).with_name("test_triton.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
