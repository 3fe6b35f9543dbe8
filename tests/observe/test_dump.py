"""The dump option: the graph after every pass, and the report, as files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import Decoder, Inputs, Sizes, Style, changed, prompt, run

STAGES = ["dynamo", "normalise", "locate", "axes", "insert", "gather", "shrink", "trim_cache",
          "check"]  # fmt: skip
LENGTH, KEPT = 24, 17


@pytest.fixture
def inputs() -> Inputs:
    return prompt(Sizes(seq=LENGTH, vision=12))


def stages(folder: Path) -> list[str]:
    return sorted(f.stem for f in folder.glob("[0-9]*.txt"))


def numbered(names: list[str]) -> list[str]:
    return [f"{i:02d}_{name}" for i, name in enumerate(names)]


@pytest.mark.parametrize("way", ["option", "environment"])
def test_every_stage_and_the_report(
    way: str, tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dump": tmp_path} if way == "option" else {}
    if way == "environment":
        monkeypatch.setenv("DARTFX_DUMP", str(tmp_path))
    _, outcome = run(Decoder(style=Style(rope="one_row")), inputs, retain_tokens=5, **options)
    assert isinstance(outcome, Pruned)
    (folder,) = tmp_path.glob("graph_*")
    assert stages(folder) == numbered(STAGES)
    text = {n: (folder / f"{s}.txt").read_text() for n, s in enumerate(stages(folder))}
    # Shapes and source lines are shown from the first stage on, the cut from "insert" on.
    assert f"[1, {LENGTH}, 16]" in text[1]
    assert "spellings.py" in text[1]
    assert ["select_tokens" in text[n] for n in range(9)] == [False] * 4 + [True] * 5
    assert f"[1, {KEPT}, 16]" not in text[3]
    assert f"[1, {KEPT}, 16]" in text[8]

    (report,) = dartfx.reports()
    assert (folder / "report.txt").read_text() == f"{report}\n"
    read = json.loads((folder / "report.json").read_text())
    expected = {"graph": report.graph, "nodes": report.nodes, "kind": "pruned", **asdict(outcome)}
    names = ("layer", "vision_tokens", "retained", "sequence")
    expected |= {name: getattr(outcome, name) for name in names}
    expected["output_code"] = []
    expected["compile"] = vars(report.compilation)
    for name in ("operators", "collectives"):
        expected[name] = read[name]
    assert read["operators"]["dartfx.select_tokens.default"] == 1
    assert read == json.loads(json.dumps(expected))
    assert read["sequence"] == [LENGTH, KEPT]


def test_option_overrides_environment(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARTFX_DUMP", str(tmp_path / "environment"))
    run(Decoder(), inputs, retain_tokens=5, dump=tmp_path / "option")
    assert [f.name for f in tmp_path.iterdir()] == ["option"]


def test_refusal_is_dumped_up_to_the_pass_that_refused(tmp_path: Path, inputs: Inputs) -> None:
    layer = changed(lambda m, x: x.cumsum(1))
    _, outcome = run(Decoder(layer=layer), inputs, retain_tokens=5, dump=tmp_path)
    assert isinstance(outcome, Declined)
    (folder,) = tmp_path.glob("graph_*")
    assert stages(folder) == numbered(STAGES[:3])
    read = json.loads((folder / "report.json").read_text())
    assert read["kind"] == "declined"
    assert (read["because"], read["where"]) == (outcome.because, outcome.where)


def test_one_folder_per_graph(tmp_path: Path) -> None:
    for size in (2, 3):
        torch._dynamo.reset()
        run(torch.nn.ReLU(), {"input": torch.ones(size)}, dump=tmp_path)
    assert sorted(f.name for f in tmp_path.glob("graph_*")) == ["graph_000", "graph_001"]
    assert stages(tmp_path / "graph_001") == ["00_dynamo"]
    read = json.loads((tmp_path / "graph_001" / "report.json").read_text())
    assert read["kind"] == "unchanged"


def test_nothing_is_written_unasked(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Decoder(), inputs, retain_tokens=5)
    assert not list(tmp_path.iterdir())


def test_where_inductors_code_is(tmp_path: Path) -> None:
    run(torch.nn.ReLU(), {"input": torch.ones(5)}, dump=tmp_path, lowering="inductor")
    folder = tmp_path / "graph_000"
    (path,) = json.loads((folder / "report.json").read_text())["output_code"]
    assert "def call(" in Path(path).read_text()
    assert f"Inductor's code: {path}" in (folder / "report.txt").read_text()
