"""``index.html`` of a dump: all graphs, calls that ran unpruned, bounded and newest first."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from dartfx.observe import folders
from dartfx.observe.dumped import graphs
from dartfx.observe.html import index
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import Decoder, Sizes, changed, prompt, run


def kinds(page: str) -> list[str]:
    return re.findall(r'data-kind="(\w+)"', page)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a program that prunes, compiles again, declines, and compiles text alone."""
    torch._dynamo.reset()
    directory = tmp_path_factory.mktemp("dump")
    model = Decoder(Sizes())
    options = {"lowering": "eager", "retain_tokens": 3, "dump": directory, "on_unsupported": "warn"}
    compiled = torch.compile(model, backend="dart", dynamic=False, options=options)
    with torch.no_grad():
        compiled(**prompt(Sizes()))
        compiled(**prompt(Sizes(seq=Sizes().seq + 3)))
    other = Decoder(layer=changed(lambda m, x: x.cumsum(1)))
    with torch.no_grad(), pytest.warns(dartfx.PruningWarning):
        torch.compile(other, backend="dart", options=options)(**prompt(Sizes()))
    run(torch.nn.ReLU(), {"input": torch.ones(2)}, dump=directory)
    folders.note_unpruned_call(directory, Declined("<script>alert(1)</script>", advice="more"))
    for _ in range(5):
        folders.note_unpruned_call(directory, Declined("past the limit"))
    index.write_index(directory)
    return (directory / "index.html").read_text()


def test_what_became_of_every_graph_newest_first(page: str) -> None:
    assert kinds(page) == ["unchanged", "declined", "pruned", "pruned"]
    assert re.findall(r'<a href="(.*?)"', page) == [
        f"graph_00{i}/report.html" for i in (3, 2, 1, 0)
    ]
    assert "before decoder layer 2: 12 -&gt; 3 vision tokens per sample" in page
    assert "try: " in page
    assert "decoders.py:" in page


def test_why_a_graph_was_compiled_again(page: str) -> None:
    (_, reason) = re.findall(r"compiled again: (.*?)</summary>", page)
    assert "size mismatch at index 1. expected 24, actual 27" in unescape(reason)
    assert "dynamo frame 0/1" in page


def test_calls_that_ran_unpruned_are_counted(page: str) -> None:
    assert "at least 4<td>" in page
    assert "past the limit" in page
    assert "<script>" not in page


def test_calls_without_a_graph_are_noted_by_the_model(tmp_path: Path) -> None:
    model = dartfx.compile(Decoder(), retain_tokens=3, lowering="eager", dump=tmp_path)
    with torch.compiler.set_stance("force_eager"), pytest.warns(dartfx.PruningWarning):
        model(**prompt(Sizes()))
    (file,) = tmp_path.glob(folders.UNPRUNED)
    (call,) = json.loads(file.read_text())
    assert call["calls"] == 1
    assert call["reason"]


def test_only_the_newest_graphs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        folder = folders.new_folder(tmp_path)
        folders.write_json(folder / folders.COMPILATION, {"process": 1, "started": number})
    monkeypatch.setattr(index, "MOST_GRAPHS", 2)
    page = index.index(tmp_path)
    assert re.findall(r">(graph_\d+)<", page) == ["graph_004", "graph_003"]
    assert "3 older graphs are in the folder" in page


def test_numbers_go_on_after_a_graph_was_removed(tmp_path: Path) -> None:
    first = folders.new_folder(tmp_path)
    folders.remove(first)
    assert folders.new_folder(tmp_path).name == "graph_001"


def test_broken_files_are_no_reason_to_fail(tmp_path: Path) -> None:
    folder = folders.new_folder(tmp_path)
    (folder / "report.json").write_text("{")
    ((graph,), _) = graphs(tmp_path)
    assert graph.kind == "unfinished"
    assert kinds(index.index(tmp_path)) == ["unfinished"]


def test_a_graph_that_is_compiled_as_several_says_so(tmp_path: Path) -> None:
    """dartfx.compile tries the whole call first."""

    class Uneven(Decoder):
        def merge(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().merge(ids, features[features.abs().sum(1) >= 0])

    model = dartfx.compile(Uneven(), retain_tokens=3, lowering="eager", dump=tmp_path)
    with torch.no_grad():
        model(**prompt(Sizes()))
    found, _ = graphs(tmp_path)
    assert "abandoned" in [graph.kind for graph in found]


def test_ranks_stand_side_by_side_and_the_first_difference_is_marked(tmp_path: Path) -> None:
    across = {"proof": "0123456789abcdef", "how": "norms", "group": "0", "ranks": 2}
    cut = {"layer": 2, "across": across, "crossings": [], "sequence": [24, 15]}
    same = {"kind": "pruned", "cuts": [cut], "sequence": [24, 15], "vision_tokens": 12,
            "retained": 3, "flops": [2, 1], "nodes": 9,
            "collectives": ["_c10d_functional.a"]}  # fmt: skip
    other = same | {"collectives": ["_c10d_functional.a", "_c10d_functional.b"]}
    for rank, reports in enumerate([[same, same, same], [same, other, other]]):
        for number, report in enumerate(reports):
            folder = tmp_path / f"rank_{rank}" / f"graph_00{number}"
            folder.mkdir(parents=True)
            folders.write_json(folder / folders.COMPILATION, {"rank": rank, "started": number})
            folders.write_json(folder / "report.json", report)
    for rank, kept in enumerate(([1, 2], [1, 3])):
        rows = {"rows": [{"vision": [1, 2, 3], "kept": kept, "pivots": []}]}
        folders.write_json(tmp_path / f"rank_{rank}" / "graph_002" / folders.KEPT, rows)
    page = index.index(tmp_path)
    assert re.findall(r'data-differs="(\d)"', page) == ["0", "1", "2"]
    assert "nothing differs" in page
    assert "kept tokens of row 0, 33% in common (Jaccard)" in page
    assert page.count("<b>first difference:</b>") == 1
    assert "rank 0 -&gt; 1: collective 2 (of 1 and 2): none -&gt; b" in page
    assert "Rank 1, Process" in page
    assert page.count("0123456789ab<") == 6


HOSTILE = "</script><script>alert"


class Hostile(torch.nn.Module):
    """A model with a module that is called so."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(HOSTILE, inner)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return getattr(self, HOSTILE)(**inputs)  # <script>alert(2)</script>


def test_what_comes_from_a_model_is_escaped(tmp_path: Path) -> None:
    z = Sizes(layers=3)
    run(Hostile(Decoder(z)), prompt(z), retain_tokens=5, dump=tmp_path)
    pages = [tmp_path / "index.html", tmp_path / "graph_000" / "report.html"]
    for page in pages:
        assert "<script>alert" not in page.read_text()
    assert "script&gt;alert" in pages[1].read_text()
