"""examples/batch_caption.py in two processes: each line exactly once, despite kills."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("accelerate")
from tests.support.processes.launching import started, torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = str(EXAMPLES / "batch_caption.py")
HELDOUT = EXAMPLES / "tiny_vlm" / "heldout"
LINES = 6


@pytest.fixture(scope="module", autouse=True)
def program() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("batch_caption")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A few questions, about images in a folder of their own."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = (HELDOUT / "questions.jsonl").read_text().splitlines()
    lines = [json.loads(text) for text in texts]
    chosen = [line for line in lines if line["type"] == "location"][:LINES]
    for line in chosen:
        shutil.copy(HELDOUT / line["image"], folder)
    written = "".join(json.dumps(line) + "\n" for line in chosen)
    (folder / "questions.jsonl").write_text(written)
    return folder / "questions.jsonl"


def arguments(questions: Path, out: Path) -> list[str]:
    given = [str(out), "--questions", str(questions), "--lowering", "eager", "--cpu"]
    return [*given, "--batch-size", "1", "--max-new-tokens", "2"]


def written(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in out.read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_started_again(program: ModuleType, questions: Path, tmp_path: Path) -> None:
    """Two processes, killed; two more; one at the end: what one process answers at once."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert program.main(arguments(questions, whole)) == 0
    with started(2, PROGRAM, *arguments(questions, out)) as run:
        deadline = time.monotonic() + 400
        while sum(len(p.read_text().splitlines()) for p in program.parts(out)) < 2:
            assert run.launcher.poll() is None, run.text()
            assert time.monotonic() < deadline, run.text()
            time.sleep(0.02)
        run.kill()
    assert not out.exists()
    answered = {n for p in program.parts(out) for n in _numbers(program, p)}
    assert 2 <= len(answered) < LINES
    with program.parts(out)[0].open("a") as file:  # the line that was being written
        file.write('{"number": 5, "ima')
    text = torchrun(2, PROGRAM, *arguments(questions, out))
    assert f"{LINES} lines, {len(answered)} of them from before" in text
    assert "process 0 of 2: 100%" in text
    assert written(out) == written(whole)
    assert [line["number"] for line in written(out)] == list(range(LINES))
    assert [line["type"] for line in written(out)] == ["location"] * LINES
    assert program.parts(out) == []
    # The model sees: random answers would be right once in ten.
    right = [line["answer"] == question["answer"] for line, question in _answered(out, questions)]
    assert sum(right) >= LINES - 2


def _numbers(program: ModuleType, path: Path) -> list[int]:
    return [line["number"] for line in program.complete_lines(path)]


def _answered(out: Path, questions: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    lines = [json.loads(text) for text in questions.read_text().splitlines()]
    return list(zip(written(out), lines, strict=True))


def test_a_kill_between_merging_and_removing_parts_repeats_nothing(
    program: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    lines = [{"number": n, "answer": str(n)} for n in range(4)]
    program.replace_with(out, [json.dumps(line) for line in lines[:3]])
    program.replace_with(program.part(out, 1), [json.dumps(line) for line in lines[1:]])
    assert program.merge(out) == 4
    assert written(out) == lines
    assert program.parts(out) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--retain-tokens", "5"], "begun with other arguments"), (["--question", "x"], None)],
)
def test_only_what_was_begun_is_continued(
    program: ModuleType,
    tmp_path: Path,
    change: list[str],
    message: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, images = tmp_path / "out.jsonl", tmp_path / "images"
    images.mkdir()
    shutil.copy(HELDOUT / "000.png", images)
    args = program.parse([str(out), "--images", str(images)])
    program.resume(out, program.settings(args, program.read_lines(args)))
    given = [str(out), "--images", str(images), "--cpu", *change]
    assert program.main(given) == 1
    assert (message or "begun with other arguments") in capsys.readouterr().err


def test_no_images_is_said(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([str(tmp_path / "out.jsonl"), "--images", str(tmp_path), "--cpu"]) == 1
    assert "no images in" in capsys.readouterr().err
