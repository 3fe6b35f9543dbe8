"""What TORCH_LOGS and TORCH_TRACE show of dartfx."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dartfx
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import Decoder, Sizes, prompt, run

LINE = (
    r"graph 0: L\['self'\]\.layers\.2: 24 -> 17 tokens \(12 -> 5 vision tokens per sample, "
    r"merge in the graph\), 1\.\d\dx fewer decoder FLOPs, KV cache layered, passes \d+\.\d\d s"
)
OPTIONS = {"retain_tokens": 5, "lowering": "eager"}
PASSES = ["normalise", "locate", "axes", "insert", "gather", "shrink", "trim cache", "check"]
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tests.support.plain.decoders import Decoder, Sizes, prompt, run
run(Decoder(), prompt(Sizes()), retain_tokens=5)
"""


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("dartfx") and r.levelno == level]
    return [r.getMessage() for r in ours]


@torch.no_grad()
def test_the_last_compilation_that_dynamo_allows_is_a_warning() -> None:
    """What comes after it runs unpruned, and nothing of ours runs that could say so."""
    sizes = [Sizes(seq=seq) for seq in (24, 25)]
    call = torch.compile(Decoder(sizes[0]), backend="dart", dynamic=False, options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=2):
        call(**prompt(sizes[0]))  # would fail if it warned
        with pytest.warns(dartfx.PruningWarning, match="recompile_limit=2 lets dynamo compile"):
            call(**prompt(sizes[1]))


def test_one_line_per_pruned_graph_and_one_per_pass(caplog: pytest.LogCaptureFixture) -> None:
    dartfx.reset()  # graphs are numbered from here
    with caplog.at_level(logging.DEBUG, logger="dartfx"):
        run(Decoder(), prompt(Sizes()), retain_tokens=5)
    (line,) = messages(caplog, logging.INFO)
    assert re.fullmatch(LINE, line)
    passes = [re.fullmatch(r"pass (.+): \d+\.\d{3} s, \d+ nodes", m)
              for m in messages(caplog, logging.DEBUG)]  # fmt: skip
    assert [m[1] for m in passes if m] == PASSES


def test_torch_logs_and_torch_trace(tmp_path: Path) -> None:
    """Both as a user sets them, in a process of its own: torch reads them when it is imported."""
    environment = {**os.environ, "TORCH_LOGS": "+dartfx", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "nothing is printed"
    assert len(re.findall(LINE, done.stderr)) == 1
    assert re.findall(r"] pass (.+): ", done.stderr) == PASSES

    shown = {}
    (trace,) = tmp_path.iterdir()
    for entry in re.split(r"^V\d{4} .*?\] (?=\{)", trace.read_text(), flags=re.MULTILINE)[1:]:
        head, _, payload = entry.partition("\n")
        about = json.loads(head)
        name = about.get("artifact", {}).get("name", "")
        if name.startswith("dartfx"):
            shown[name] = about, re.sub("^\t", "", payload, flags=re.MULTILINE)
    assert list(shown) == ["dartfx_graph_before", "dartfx_graph_after", "dartfx_report"]
    before, after, report = (payload for _, payload in shown.values())
    assert "select_tokens" not in before
    assert "select_tokens" in after
    assert json.loads(report)["sequence"] == [24, 17]
    # tlparse files artifacts under the compilation that they came from.
    assert all(about["frame_id"] == 0 for about, _ in shown.values())


def test_decode_steps_of_a_padded_batch_raise_no_suspicion() -> None:
    # Their mask's size is read from a cache, outside any layer.
    torch.compiler.reset()
    dartfx.reset()
    family = load("llava", layers=3)
    dartfx.compile(family.model, retain_tokens=6, lowering="eager")
    family.model.generate(**family.make_inputs("pad2"), max_new_tokens=4, do_sample=False)
    assert [r.pruned for r in dartfx.reports()] == [True, False, False]
    assert not any(getattr(r.outcome, "unsure", False) for r in dartfx.reports())
