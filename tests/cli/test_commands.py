"""``python -m dartfx doctor``, ``explain`` and ``show``, as a user calls them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dartfx
from dartfx.cli import doctor
from dartfx.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a 4 by 4 grid of vision tokens, saved as one downloads it, and an image."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import vlm
    finally:
        sys.path.remove(str(EXAMPLES))
    folder, size = tmp_path_factory.mktemp("model"), vlm.SIZES["tiny"]
    vlm.build_model(size, seed=3).save_pretrained(folder)
    vlm.build_processor(size).save_pretrained(folder)
    Image.effect_noise((56, 56), 80.0).save(folder / "image.png")
    return folder


def call(command: str, saved: Path, *more: str) -> int:
    image = str(saved / "image.png")
    return main([command, "--model", str(saved), "--image", image, "--retain-tokens", "6", *more])


def test_explain(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", saved, "--tokens", "--dump", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "vision tokens: 16 per sample (merge in the graph), 6 retained" in text
    assert "row 0, image 0: 6 of 16 kept" in text
    kinds = [json.loads(f.read_text())["kind"] for f in tmp_path.glob("*/report.json")]
    assert "pruned" in kinds


def test_explain_exits_with_1_when_nothing_would_be_pruned(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("explain", saved, "--layer", "9") == 1
    assert "NOT pruned: layer=9" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kept.png", "kept.html"])
def test_show(saved: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / name
    assert call("show", saved, "--out", str(out)) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    kept = dartfx.kept_tokens()[0].kept
    if name == "kept.html":
        told = re.findall(r"<title>token (\d+), row \d, column \d, (\w+)", out.read_text())
        assert [int(i) for i, state in told if state != "dropped"] == list(kept)
        return
    # The dropped patches are dimmed, and only they.
    grey = Image.open(out).convert("HSV").getchannel("V")
    step = grey.width // 4
    mean = {
        i: grey.crop((x, y, x + step, y + step))
        .resize((1, 1), Image.Resampling.BOX)
        .getpixel((0, 0))
        for i, (y, x) in enumerate((r * step, c * step) for r in range(4) for c in range(4))
    }
    assert min(mean[i] for i in kept) > 2 * max(mean[i] for i in mean if i not in kept)


@pytest.mark.parametrize(
    ("more", "views"),
    [
        (("--tiles", "1x3"), 2),
        (("--tiles", "2x2", "--overview", "none"), 1),
        (("--anyres", "3x3"), 2),
        (("--grid", "4x2x2"), 4),
    ],
)
def test_show_takes_the_layout_that_is_named(
    saved: Path, tmp_path: Path, more: tuple[str, ...], views: int
) -> None:
    out = tmp_path / "kept.html"
    assert call("show", saved, "--out", str(out), *more) == 0
    shown = re.findall(r'<rect x="(\d+)"', out.read_text())
    assert len(shown) == (13 if "--anyres" in more else 16), "newlines have no place"
    starts = {int(x) // 340 for x in shown} if views == 4 else {int(x) // 680 for x in shown}
    assert starts == set(range(views))


def test_show_says_which_option_names_a_layout_that_is_not_known(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dartfx.token_map import infer_layout, kept_tokens

    def untold(inputs: Any, runs: Any) -> Any:
        raise infer_layout._unknown("tiles of unknown numbers")

    monkeypatch.setattr(kept_tokens, "from_inputs", untold)
    assert call("show", saved, "--out", str(tmp_path / "kept.png")) == 2
    error = capsys.readouterr().err
    assert "is not known: tiles of unknown numbers; name it" in error
    assert error.endswith("here by --grid, --tiles or --anyres\n")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--out", "kept.gif"), "--out must end in .png or .html"),
        (("--grid", "five"), "--grid is like 24x24"),
        (("--grid", "3x3"), "the layouts have 9 tokens, but the prompt 16"),
        (("--tiles", "2x0"), "--tiles is like 2x3, got '2x0'"),
        (("--tiles", "2x2"), "the layouts have 5 tokens, but the prompt 16"),
        (("--anyres", "3"), "--anyres is like 36x48, got '3'"),
        (("--anyres", "4x4"), "the layouts have 20 tokens, but the prompt 16"),
        (("--selector", "drat"), "did you mean 'dart'?"),
        (("--model", "no/such/folder/here"), "cannot load the model"),
        (("--image", "none.png"), "cannot read the image 'none.png'"),
    ],
)
def test_show_says_what_is_wrong(
    saved: Path, more: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("show", saved, *more) == 2
    assert told in capsys.readouterr().err


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
    versions = {"torch": "2.9.1+cpu", "transformers": "4.57.0", "triton": "3.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert main(["doctor", "--lowering", "eager"]) == 1
    text = capsys.readouterr().out
    assert "bad   torch 2.9.1+cpu is older than 2.11" in text
    assert "fix: pip install --upgrade 'torch>=2.11'" in text
    assert "bad   transformers 4.57.0 is older than 5.17" in text
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
