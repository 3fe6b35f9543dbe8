"""``dartfx diff``: equal and different dumps, kept tokens, filters, exit statuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from dartfx.cli.main import main
from dartfx.observe import folders
from dartfx.observe.compare import compare
from dartfx.observe.html.comparison import page
from dartfx.observe.kept import add_picture, kept_in_common, note_views
from dartfx.token_map.kept_tokens import KeptTokens
from dartfx.token_map.layout import Layout
from tests.support.plain.decoders import Decoder, Sizes, prompt

SIZES = Sizes(seq=24, vision=9)


def dump(directory: Path, **options: Any) -> Path:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = Decoder(SIZES), prompt(SIZES)
    options = {"retain_tokens": 4, "lowering": "eager", "tokens": True} | options
    dartfx.compile(model, dump=directory, **options)
    with torch.no_grad():
        model(**inputs)
    return directory


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of one program, one that keeps other tokens, one that keeps fewer."""
    root = tmp_path_factory.mktemp("dumps")
    return {
        "one": dump(root / "one"),
        "again": dump(root / "again"),
        "uniform": dump(root / "uniform", selector="uniform"),
        "fewer": dump(root / "fewer", retain_tokens=3, dump_passes="^gather$"),
    }


def differences(one: Path, other: Path) -> list[str]:
    return [str(d) for pair in compare(one, other).pairs for d in pair.differences]


def test_the_same_program_gives_equal_dumps(dumps: dict[str, Path]) -> None:
    assert differences(dumps["one"], dumps["again"]) == []
    assert main(["diff", str(dumps["one"]), str(dumps["again"])]) == 0


def test_another_selector_keeps_other_tokens(
    dumps: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [
        set(folders.read_json(dumps[n] / "graph_000" / "kept.json")["rows"][0]["kept"])
        for n in ("one", "uniform")
    ]
    common = len(kept[0] & kept[1]) / len(kept[0] | kept[1])
    (difference,) = differences(dumps["one"], dumps["uniform"])
    assert difference == (
        f"kept tokens of row 0, {common:.0%} in common (Jaccard): 4 tokens -> 4 tokens"
    )
    written = tmp_path / "diff.html"
    argv = ["diff", str(dumps["one"]), str(dumps["uniform"]), "--html", str(written)]
    assert main(argv) == 1
    assert "(selector: default -> uniform)" in capsys.readouterr().out
    assert written.read_text().count('<tr class="difference">') == 1
    assert "first difference" in written.read_text()


def two_images(kept: list[int]) -> dict[str, Any]:
    """kept.json of a row with an image at 1 to 4 and a video of two frames at 6 to 9."""
    return {"rows": [{"vision": [1, 2, 3, 4, 6, 7, 8, 9], "kept": kept, "pivots": []}]}


def test_kept_tokens_are_compared_by_image_and_by_view(tmp_path: Path) -> None:
    frames = KeptTokens(0, 1, (6, 7, 8, 9), (), layout=Layout.grid(2, 1, 2))
    image = KeptTokens(0, 0, (1, 2, 3, 4), (), layout=Layout.grid(2, 2))
    for name, kept in (("one", [1, 2, 6, 8]), ("other", [1, 2, 6, 9])):
        folder = tmp_path / name / "graph_000"
        folder.mkdir(parents=True)
        folders.write_json(folder / folders.KEPT, two_images(kept))
        note_views(tmp_path / name, [(k.row, k.views()) for k in (image, frames)])
    read = [folders.read_json(f) for f in sorted(tmp_path.glob(f"*/graph_000/{folders.KEPT}"))]
    assert list(kept_in_common(*read)) == [
        ("row 0", 3 / 5, (4, 4)),
        ("row 0, image 0", 1.0, (2, 2)),
        ("row 0, image 1", 1 / 3, (2, 2)),
        ("row 0, image 1, view 0", 1.0, (1, 1)),
        ("row 0, image 1, view 1", 0.0, (1, 1)),
    ]
    assert differences(tmp_path / "one", tmp_path / "other")[1:] == [
        "kept tokens of row 0, image 1, 33% in common (Jaccard): 2 tokens -> 2 tokens",
        "kept tokens of row 0, image 1, view 1, 0% in common (Jaccard): 1 tokens -> 1 tokens",
    ]


def test_graphs_without_vision_tokens_are_one_line_and_common_notes_another(
    dumps: dict[str, Path], tmp_path: Path
) -> None:
    both = []
    for name in ("one", "uniform"):
        shutil.copytree(dumps[name], tmp_path / name)
        other = tmp_path / name / "graph_001"
        shutil.copytree(dumps[name] / "graph_000", other)
        (other / folders.KEPT).unlink()
        report = folders.read_json(other / "report.json") | {"kind": "unchanged", "because": ""}
        folders.write_json(other / "report.json", report)
        both.append(tmp_path / name)
    text = str(compare(*both))
    assert text.count("(selector: default -> uniform)") == 1
    assert "1 other graphs, without vision tokens: the same" in text
    assert "graph_001" not in text
    assert "graph_001" not in page([compare(*both)])


def test_measured_times_are_noted(dumps: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(dumps["one"], tmp_path / "one")
    file = tmp_path / "one" / "graph_000" / "report.json"
    measured = {"profile": {"regions": [{"seconds": [0.2, 0.125]}, {"seconds": [0, 0.025]}]}}
    folders.write_json(file, folders.read_json(file) | measured)
    (pair,) = compare(tmp_path / "one", dumps["one"]).pairs
    assert not pair.differences
    assert "time of a run, as profiled: 150 ms -> not known" in map(str, pair.notes)


def test_another_budget_gives_other_shapes(dumps: dict[str, Path]) -> None:
    found = differences(dumps["one"], dumps["fewer"])
    assert "tokens per sample: 24 to 19 -> 24 to 18" in found
    assert "retained vision tokens: 4 -> 3" in found


def test_several_are_compared_with_the_first(
    dumps: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the folders of ranks: the first difference of each is marked."""
    assert main(["diff", *(str(dumps[n]) for n in ("one", "again", "uniform"))]) == 1
    out = capsys.readouterr().out
    assert out.count("first difference: ") == 1
    assert f"{dumps['one']} and {dumps['again']}: equal" in out


def test_a_graph_that_one_lacks(dumps: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(dumps["one"], tmp_path / "two")
    shutil.copytree(dumps["one"] / "graph_000", tmp_path / "two" / "graph_001")
    assert differences(dumps["one"], tmp_path / "two") == ["graph: none -> pruned"]


def test_only_the_passes_that_are_wanted_are_written(dumps: dict[str, Path]) -> None:
    files = [f.name for f in (dumps["fewer"] / "graph_000").glob("[0-9]*.txt")]
    assert files == ["05_gather.txt"]


def test_only_the_graphs_that_are_wanted_are_kept(tmp_path: Path) -> None:
    dump(tmp_path / "pruned", dump_graphs=r"pruned .*decoders\.py")
    dump(tmp_path / "none", dump_graphs="declined")
    assert [f.name for f in (tmp_path / "pruned").glob("graph_*")] == ["graph_000"]
    assert not list((tmp_path / "none").glob("graph_*"))


@pytest.mark.parametrize("value", ["(", "", 3])
@pytest.mark.parametrize("option", ["dump_graphs", "dump_passes"])
def test_a_filter_must_be_a_regular_expression(option: str, value: object) -> None:
    with pytest.raises(dartfx.ConfigError, match=option):
        dartfx.DartConfig.from_options({option: value})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{one}"], "argument DUMP: name at least two folders"),
        (["{one}", "{one}/none"], "argument DUMP: there is no folder"),
        (["{one}", "{empty}"], "argument DUMP: '{empty}' holds no graph_NNN folder"),
        (["{one}", "{one}", "--html", "{empty}"], "argument --html: '{empty}' is a folder"),
    ],
)
def test_bad_arguments_are_named(
    argv: list[str], message: str, dumps: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"one": str(dumps["one"]), "empty": str(tmp_path)}
    assert main(["diff", *(part.format(**names) for part in argv)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(**names)}")


def test_kept_tokens_are_in_the_report(dumps: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(dumps["one"] / "graph_000", tmp_path / "graph_000")
    shown = tmp_path / "graph_000" / "report.html"
    assert "row 0, image 0: 4 of 9 tokens kept" in shown.read_text()
    assert shown.read_text().count("<rect class=") == 4
    assert 'viewBox="0 0 30 30"' in shown.read_text()
    add_picture(tmp_path / "graph_000", b"PNG")
    assert 'src="data:image/png;base64,UE5H"' in shown.read_text()
