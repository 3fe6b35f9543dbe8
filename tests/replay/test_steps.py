"""``repro.py --pass``, ``--bisect`` and ``--time``."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from dartfx.passes import pipeline
from dartfx.passes.outcome import Pruned
from tests.support.plain.decoders import Decoder, Sizes, Style, prompt, run


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch._dynamo.reset()
    directory, z = tmp_path_factory.mktemp("dump"), Sizes(seq=24, vision=12)
    model = Decoder(z, Style(rope="one_row"))
    _, outcome = run(model, prompt(z), retain_tokens=5, dump=directory)
    assert isinstance(outcome, Pruned)
    return directory / "graph_000" / "repro.py"


def output(script: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    runpy.run_path(str(script))["main"](list(arguments))
    return capsys.readouterr().out


def test_it_stops_after_a_pass(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(script, capsys, "--pass", "insert")
    assert "select_tokens" in shown
    assert "index_select" not in shown  # gather did not run
    whole = (script.parent / "04_insert.txt").read_text()
    assert shown.count(" = torch.ops.") == whole.count(" = torch.ops.")


def test_a_pass_that_did_not_run_is_named(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        output(script, capsys, "--pass", "gather 2")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --pass: no pass 'gather 2' ran; these did: normalise")


def test_no_pass_changes_the_numbers(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(script, capsys, "--bisect", "--tolerance", "0")
    assert shown.count("largest difference 0.0e+00") == 8
    assert "no pass changes the numbers by more than 0" in shown


@pytest.mark.parametrize("broken", ["shrink", "gather"])
def test_the_first_pass_with_other_numbers_is_found(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    names = {"shrink": "shrink_sizes", "gather": "gather_frontier"}
    real: Any = getattr(pipeline, names[broken])

    def wrong(region: Any, *more: Any) -> Any:
        result = real(region, *more)
        graph = region.site.hidden.graph
        last = [n for n in graph.nodes if n.target is torch.ops.aten.linear.default][-1]
        with graph.inserting_after(last):
            twice = graph.call_function(torch.ops.aten.add.Tensor, (last, last))
        twice.meta = dict(last.meta)
        last.replace_all_uses_with(twice, lambda user: user is not twice)
        return result

    monkeypatch.setattr(pipeline, names[broken], wrong)
    shown = output(script, capsys, "--bisect")
    assert f"the first pass with other numbers: {broken}" in shown
    assert shown.count("<- first above the tolerance") == 1


def test_both_are_timed(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(script, capsys, "--time")
    assert "time unpruned: " in shown
    assert "x as fast" in shown


def test_both_graphs_are_written_for_model_explorer(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "graphs.json"
    output(script, capsys, "--export", str(file))
    before, after = json.loads(file.read_text())["graphs"]
    assert (before["id"], after["id"]) == ("before", "after")
    assert not any("style" in node for node in before["nodes"])
    added = {node["id"]: node for node in after["nodes"] if "style" in node}
    kept = {node["id"] for node in before["nodes"]} & {node["id"] for node in after["nodes"]}
    assert added.keys() | kept == {node["id"] for node in after["nodes"]}
    select = added["select_tokens_default"]
    known = {node["id"] for node in after["nodes"]}
    assert {edge["sourceNodeId"] for edge in select["incomingEdges"]} <= known
    assert select["outputsMetadata"][0]["attrs"][0]["value"] == "int64[1, 17]"
    assert "layers.2/attn" in {node["namespace"] for node in after["nodes"]}


def test_a_file_that_cannot_be_written_is_named(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        output(script, capsys, "--export", str(tmp_path / "none" / "graphs.json"))
    assert capsys.readouterr().err.startswith("error: argument --export: [Errno 2]")
