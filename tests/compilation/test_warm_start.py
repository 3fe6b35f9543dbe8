"""Compiled code outlives its process in Inductor's caches, and never serves other options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# A decoder in plain torch with the selector of fewest kernels: Inductor's caches know nothing of
# either.  Its vocabulary is no other test's, as the folder of compiled code is that of the run.
PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
import dartfx
from tests.support.plain.decoders import Decoder, Sizes, prompt

def compiled(retain):
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    z = Sizes(layers=4, vocab=41)
    model, inputs = Decoder(z).eval(), prompt(z)
    options = {"layer": 2, "selector": "uniform", "on_unsupported": "error"}
    model = dartfx.compile(model, retain_tokens=retain, **options)
    with torch.no_grad():
        logits = model(**inputs)[0]
    (report,) = (r for r in dartfx.reports()[-1:] if r.pruned)
    assert [calls for calls, _ in report.compilation.outlined] == [2, 2]
    found = counters["aot_autograd"]
    return {
        "hit": found["autograd_cache_hit"],
        "miss": found["autograd_cache_miss"],
        "tokens": logits.shape[1],
        "sum": logits.double().sum().item(),
    }

process, artifacts = sys.argv[1:]
if process == "first":
    result = [compiled(5)]
    dartfx.save_cache(artifacts)
elif process == "second":
    result = [compiled(5), compiled(6)]
else:
    with fresh_cache():
        dartfx.load_cache(artifacts)
        result = [compiled(5)]
print(json.dumps(result))
"""


# Notes what the C++ compiler is called for, besides its version.
COMPILER = """#!/bin/sh
case "$1" in -v|--version) ;; *) echo "$@" >> "$0.log" ;; esac
exec {real} "$@"
"""


def run(process: str, artifacts: Path, path: Path | None = None) -> list[dict[str, Any]]:
    """Hits and misses of AOTAutograd's cache, which holds what Inductor compiled.

    path: a folder of programs that come before the others.
    """
    programs = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, process, str(artifacts)],
        cwd=ROOT,
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm_start") / "artifacts"


@pytest.fixture(scope="module")
def first(artifacts: Path) -> dict[str, Any]:
    """What the first process found; it also writes the artifacts."""
    (found,) = run("first", artifacts)
    return found


def warm(first: dict[str, Any]) -> dict[str, Any]:
    return {**first, "hit": first["miss"], "miss": 0}


@pytest.mark.slow
def test_a_second_process_starts_warm_and_another_option_does_not(
    first: dict[str, Any], artifacts: Path
) -> None:
    assert first["miss"] >= 1
    assert first["hit"] == 0
    same_option, other_option = run("second", artifacts)
    assert same_option == warm(first)
    assert other_option["tokens"] == first["tokens"] + 1
    assert other_option["miss"] >= 1


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A C++ compiler that notes its calls."""
    program = tmp_path / "g++"
    program.write_text(COMPILER.format(real=shutil.which("g++")))
    program.chmod(0o755)
    return program


@pytest.mark.slow
def test_another_machine_starts_warm_from_artifacts(
    first: dict[str, Any], artifacts: Path, compiler: Path
) -> None:
    calls = compiler.with_name("g++.log")
    assert run("third", artifacts, compiler.parent) == [warm(first)]
    assert not calls.exists()
    # The same without the compiled kernels: the graph is known, its kernels are not.
    graphs_only = compiler.with_name("graphs_only")
    with zipfile.ZipFile(artifacts) as saved, zipfile.ZipFile(graphs_only, "w") as other:
        kept = [name for name in saved.namelist() if not name.startswith("kernels/")]
        assert len(kept) < len(saved.namelist())
        for name in kept:
            other.writestr(name, saved.read(name))
    assert run("third", graphs_only, compiler.parent) == [warm(first)]
    assert ".main.cpp" in calls.read_text()
