"""``repro.py --profile`` and ``dartfx profile``: measured time, FLOPs and bytes."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dartfx.cli.main import main
from dartfx.passes.outcome import Pruned
from dartfx.replay import progress
from dartfx.replay.measured import Profile, Region
from dartfx.replay.profile import REGIONS
from tests.support.plain.decoders import Decoder, Sizes, Style, changed, prompt, run


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    torch._dynamo.reset()
    directory, z = tmp_path_factory.mktemp("dump"), Sizes(seq=24, vision=12)
    model = Decoder(z, Style(rope="one_row"))
    _, outcome = run(model, prompt(z), retain_tokens=5, dump=directory)
    assert isinstance(outcome, Pruned)
    return directory, outcome


@pytest.fixture(scope="module")
def profiled(dumped: tuple[Path, Pruned], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the dump after ``dartfx profile``."""
    copied = tmp_path_factory.mktemp("profiled")
    shutil.copytree(dumped[0], copied, dirs_exist_ok=True)
    assert main(["profile", str(copied)]) == 0
    return copied / "graph_000"


def test_the_report_holds_what_was_measured(profiled: Path, dumped: tuple[Path, Pruned]) -> None:
    found = json.loads((profiled / "report.json").read_text())["profile"]
    regions = {region["name"]: region for region in found["regions"]}
    # This graph takes vision features as an input: it holds no tower.
    assert list(regions) == [name for name in REGIONS if name != "vision tower"]
    assert all(region["seconds"][1] > 0 for region in regions.values())
    layers = [regions[name]["flops"] for name in REGIONS if "layers" in name]
    assert tuple(map(sum, zip(*layers, strict=True))) == dumped[1].flops
    assert regions["selection and gathers"]["seconds"][0] == 0
    assert regions["selection and gathers"]["bytes"][0] == 0
    page = (profiled / "report.html").read_text()
    table = page[page.index('id="profiled"') :].partition("</table>")[0]
    assert re.findall(r"<tr><td>([^<]+)<td", table) == [*regions, "whole graph"]
    assert 'href="trace.json"' in page


def test_the_trace_names_graph_and_region(profiled: Path) -> None:
    events = json.loads((profiled / "trace.json").read_text())["traceEvents"]
    names = Counter(name for e in events if str(name := e.get("name")).startswith("dartfx, "))
    shown = [name for name in REGIONS if name != "vision tower"]
    assert {f"dartfx, pruned: {region}" for region in shown} <= names.keys()
    assert "dartfx, unpruned: layers behind the cut" in names


def test_a_second_profile_replaces_the_first(profiled: Path) -> None:
    assert main(["profile", str(profiled)]) == 0
    assert (profiled / "report.html").read_text().count('id="profiled"') == 1


def test_a_repro_prints_the_same_table(
    dumped: tuple[Path, Pruned], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of = runpy.run_path(str(dumped[0] / "graph_000" / "repro.py"))["main"]
    main_of(["--profile", str(tmp_path / "trace.json")])
    shown = capsys.readouterr().out
    assert re.search(r"^layers behind the cut +[\d.]+ +[\d.]+ +\d+%", shown, re.MULTILINE)
    assert (tmp_path / "trace.json").is_file()
    with pytest.raises(SystemExit):
        main_of(["--profile", str(tmp_path / "none" / "trace.json")])
    assert "argument --profile: there is no folder" in capsys.readouterr().err


PROFILE = Profile(
    (
        Region("layers before the cut", (0.5, 0.5), (50, 50), (5, 5)),
        Region("selection and gathers", (0.0, 0.4), (0, 0), (0, 2)),
        Region("layers behind the cut", (0.5, 0.1), (50, 50), (5, 1)),
    ),
    "CPU",
    3,
)


def test_where_time_and_flops_part_is_said() -> None:
    assert list(PROFILE.sentences()) == [
        "selection and gathers: 40% of the pruned graph's time for 0% of its FLOPs, more than its "
        "arithmetic explains",
        "layers behind the cut: 10% of the pruned graph's time for 50% of its FLOPs, less than its "
        "arithmetic explains",
    ]
    early, _, late = PROFILE.regions
    halved = replace(PROFILE, regions=(early, replace(late, seconds=(0.5, 0.5), flops=(50, 25))))
    assert list(halved.sentences()) == [
        "the whole graph is 1.00x as fast with 1.33x fewer FLOPs: time falls less than "
        "arithmetic, most of it now goes to layers before the cut",
        "layers before the cut: 50% of the pruned graph's time for 67% of its FLOPs, less than "
        "its arithmetic explains",
        "layers behind the cut: 50% of the pruned graph's time for 33% of its FLOPs, more than "
        "its arithmetic explains",
    ]


def test_a_bar_is_shown_for_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 4.0, 6.0, 0.0, 0.1])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("profile", 3) as bar:
        bar.step()  # three seconds in all, so far
        assert not capsys.readouterr().err
        bar.step()
        assert "profile [####################          ] 2/3, 2 s left" in capsys.readouterr().err
        bar.step()
    with progress.Progress("profile", 1) as short:
        capsys.readouterr()
        short.step()
    assert not capsys.readouterr().err


def test_a_model_is_profiled(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(saved), "--image", str(saved / "image.png"), "--retain-tokens", "6"]
    trace = tmp_path / "trace.json"
    assert main(["profile", *model, "--trace", str(trace), "--dump", str(tmp_path / "d")]) == 0
    out, progress_lines = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[2:9]] == [*REGIONS, "whole graph"]
    assert "...    tracing the model's prefill" in progress_lines
    assert trace.read_bytes() == (tmp_path / "d" / "graph_000" / "trace.json").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "argument --model: name a model and an image, or the folder of a dump"),
        (["{root}/none"], "argument DUMP: there is no folder"),
        (["{root}"], "argument DUMP: '{root}' holds no pruned graph; see its index.html"),
        (["{root}", "--trace", "{root}"], "argument --trace: '{root}' is a folder"),
    ],
)
def test_bad_arguments_are_named(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path)
    assert main(["profile", *(part.format(root=root) for part in argv)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(root=root)}")


def test_a_graph_that_is_not_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused: Any = changed(lambda m, x: x.cumsum(1))
    run(Decoder(layer=refused), prompt(Sizes()), retain_tokens=5, dump=tmp_path)
    assert main(["profile", str(tmp_path / "graph_000")]) == 1
    assert capsys.readouterr().out.startswith("not profiled: ")
