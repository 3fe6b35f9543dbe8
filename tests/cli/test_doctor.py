"""``dartfx doctor``, called as by a user."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

import dartfx
from dartfx.cli import doctor
from dartfx.cli.main import main


def test_the_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lowering", "aot_eager"]) == 0
    text, progress = capsys.readouterr()
    assert progress.splitlines() == [
        "...    pruning a tiny model and running it eagerly",
        "...    compiling a tiny model by aot_eager",
    ]
    assert f"torch {torch.__version__}" in text
    assert 'backend="dart" is dartfx.backend:dart' in text
    assert "a tiny model was pruned and compiled by aot_eager" in text
    assert "bad" not in text
    assert text.endswith("everything dartfx needs works\n")


def test_a_quick_doctor_compiles_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiles(*_: Any, **__: Any) -> None:
        raise AssertionError("--quick compiled something")

    monkeypatch.setattr(torch, "compile", compiles)
    assert main(["doctor", "--quick"]) == 0
    text, progress = capsys.readouterr()
    assert not progress
    assert "C++ compiler" in text
    assert text.endswith(
        "note   no model was pruned and compiled (--quick)\neverything checked works\n"
    )


def no_model(lowering: str) -> doctor.Finding:
    return doctor.Finding("ok", f"not run: {lowering}")


def test_the_doctor_says_what_is_wrong_and_how_to_fix_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_tiny_model", no_model)
    versions = {"torch": "2.9.1+cpu", "transformers": "4.57.0", "triton": "3.0", "vllm": "0.31.1"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert main(["doctor", "--lowering", "eager"]) == 1
    text = capsys.readouterr().out
    assert "bad   torch 2.9.1+cpu is older than 2.11" in text
    assert "fix: pip install --upgrade 'torch>=2.11'" in text
    assert "bad   transformers 4.57.0 is older than 5.17" in text
    assert "note   vLLM 0.31.1: dartfx prunes inside vLLM 0.32 only" in text
    assert "fix: pip install 'vllm==0.32.*'" in text
    assert "bad   no entry point" in text
    assert text.endswith("3 of the above must be fixed\n")


def test_the_doctor_survives_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the compiler fell over\nand its trace is long")

    monkeypatch.setattr(doctor, "_run", broken)
    *_, last = doctor.examine("eager")
    assert (last.state, last.what) == ("bad", "RuntimeError: the compiler fell over")


def test_the_doctor_notices_an_unpruned_and_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    good, reports = torch.ones(2), [dartfx.Report(0, 1, pruned())]
    monkeypatch.setattr(doctor, "_run", lambda *_: (good, []))
    assert "a tiny model was not pruned: dynamo made no graph" in doctor._tiny_model("eager").what
    outputs = iter([good, good + 0.5])
    monkeypatch.setattr(doctor, "_run", lambda *_: (next(outputs), reports))
    assert "is off by 5.0e-01" in doctor._tiny_model("inductor").what


def pruned() -> dartfx.passes.outcome.Pruned:
    cut = dartfx.passes.outcome.Cut(2, 4, 2, (8, 6), ())
    costs = {"kv_layout": "layered", "flops": (2, 1), "kv_bytes": (2, 1)}
    return dartfx.passes.outcome.Pruned("layers", "merge", batch=1, cuts=(cut,), **costs)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    found = doctor._compiler("inductor")
    assert found.state == ("note" if torch.cuda.is_available() else "bad")
    assert found.fix == "apt-get install g++, or set CXX"
