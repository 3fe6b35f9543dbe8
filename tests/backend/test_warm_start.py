"""Compiled code outlives its process in Inductor's caches, and never serves other options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
import dartfx
from dartfx.tools.zoo.registry import load

retain, artifacts, write = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "write"
if artifacts and not write:
    torch.compiler.load_cache_artifacts(open(artifacts, "rb").read())
family = load("llava")
dartfx.compile(family.model, retain_tokens=retain, on_unsupported="error")
with torch.no_grad():
    logits = family.model(**family.make_inputs(), use_cache=False).logits
if write:
    open(artifacts, "wb").write(torch.compiler.save_cache_artifacts()[0])
kinds = {"hit": 0, "miss": 0}
for name, count in counters["aot_autograd"].items():
    if name in ("autograd_cache_hit", "autograd_cache_miss"):
        kinds[name.rpartition("_")[2]] += count
print(json.dumps({**kinds, "tokens": logits.shape[1], "sum": logits.double().sum().item()}))
"""


def run(cache: Path, retain: int = 6, artifacts: str = "", write: bool = False) -> dict[str, Any]:
    """One process: hits and misses of AOTAutograd's cache, which holds what Inductor compiled."""
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(retain), artifacts, "write" if write else ""],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    result: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_a_second_process_starts_warm_and_another_option_does_not(tmp_path: Path) -> None:
    artifacts = str(tmp_path / "artifacts")
    first = run(tmp_path / "a", artifacts=artifacts, write=True)
    assert first["miss"] >= 1
    assert first["hit"] == 0
    same_folder = run(tmp_path / "a")
    assert same_folder == {**first, "hit": first["miss"], "miss": 0}
    other_machine = run(tmp_path / "b", artifacts=artifacts)
    assert other_machine == same_folder
    other_option = run(tmp_path / "a", retain=7)
    assert other_option["tokens"] == first["tokens"] + 1
    assert other_option["miss"] >= 1
