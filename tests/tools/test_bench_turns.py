"""``bench generate --turns``: what each row continues from, and how many tokens it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dartfx.cli.main import main
from dartfx.tools.bench.generate.turns import LABELS, QUESTION
from dartfx.tools.zoo.shapes import SHAPES

NEW = 3


def test_later_turns_of_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "bench generate --model-shape tiny --device cpu --lowering eager --rows plain dart"
    few = f"--dynamic --new-tokens {NEW} --repeat 1 --warmup 1 --turns 3"
    file = tmp_path / "figures.json"
    assert main([*tiny.split(), *few.split(), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    prompt, dropped = (
        result["model"]["prompt_tokens"],
        result["model"]["vision_tokens"] - SHAPES["tiny"][1],
    )
    rows = {row["label"]: row["turns"] for row in result["turns"]}
    assert list(rows) == [label for both in LABELS.values() for label in both]
    per_token = None
    for label, turns in rows.items():
        assert [t["turn"] for t in turns] == [2, 3]
        for turn in turns:
            assert turn["tokens"] == prompt + (turn["turn"] - 1) * (NEW + QUESTION)
            assert turn["first_token_seconds"] > 0
            # The last token of an answer is in no cache.
            held = turn["tokens"] + NEW - 1 - dropped * label.startswith("dart")
            per_token = per_token or turn["kv_bytes"] / held
            assert turn["kv_bytes"] == held * per_token
    printed = capsys.readouterr().out
    assert "| dart, its pruned cache |" in printed
    assert "turn 3: first token, ms" in printed
