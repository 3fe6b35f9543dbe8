"""``dartfx explain`` and ``show``, called as by a user."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dartfx
from tests.cli.conftest import call
from tests.support.slow import slow


def test_explain(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", saved, "--tokens", "--dump", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "vision tokens: 16 per sample (merge in the graph), 6 retained" in text
    assert "row 0, image 0: 6 of 16 kept" in text
    kinds = [json.loads(f.read_text())["kind"] for f in tmp_path.glob("*/report.json")]
    assert "pruned" in kinds
    (kept,) = tmp_path.glob("*/kept.json")
    (row,) = json.loads(kept.read_text())["rows"]
    assert row["views"] == [[[position, 0] for position in row["vision"]]]


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
        message = re.findall(r"<title>token (\d+), row \d, column \d, (\w+)", out.read_text())
        assert [int(i) for i, state in message if state != "dropped"] == list(kept)
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
        (("--tiles", "2x2", "--overview", "none"), 1),
        (("--anyres", "3x3"), 2),
        *slow((("--tiles", "1x3"), 2), (("--grid", "4x2x2"), 4)),
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
    assert error.endswith("give their layout by --grid, --tiles or --anyres\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--out", "kept.gif"), "--out: 'kept.gif' must end in .png or .html"),
        (("--grid", "five"), "--grid: got 'five', not something like 24x24"),
        (("--grid", "3x3"), "the layouts have 9 tokens, but the prompt 16"),
        (("--tiles", "2x0"), "--tiles: got '2x0', not something like 2x3"),
        (("--anyres", "3"), "--anyres: got '3', not something like 36x48"),
        (("--selector", "drat"), "did you mean 'dart'?"),
        *slow(
            (("--tiles", "2x2"), "the layouts have 5 tokens, but the prompt 16"),
            (("--anyres", "4x4"), "the layouts have 20 tokens, but the prompt 16"),
        ),
    ],
)
def test_show_says_what_is_wrong(
    saved: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("show", saved, *more) == 2
    assert message in capsys.readouterr().err
