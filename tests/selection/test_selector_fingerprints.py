"""Fingerprints of selectors depend on what they compute, and nothing else."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dartfx.selection import registry
from dartfx.selection.registry import BUILT_IN, register_selector, selector_fingerprint


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


SOURCE = """
from dartfx.selection.registry import register_selector, selector_fingerprint

@register_selector("mine")
def mine(hidden, keys, vision_mask, text_mask, budget, **pivots):
    return vision_mask & (vision_mask.cumsum(1) <= budget[:, None]{edit})

print(selector_fingerprint("mine"))
"""


def test_fingerprints_follow_the_source_across_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(edit: str) -> str:
        registry._ENTRIES.pop("mine", None)
        script.write_text(SOURCE.format(edit=edit))
        runpy.run_path(str(script))
        return capsys.readouterr().out.strip()

    script = tmp_path / "my_selector.py"
    before, after = here(" + 0"), here("")
    assert len(before) == len(after) == 64
    assert before != after
    code = f"import sys, runpy; sys.path[:0] = {sys.path!r}; runpy.run_path({str(script)!r})"
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert there.strip() == after


def test_fingerprints_see_closures_and_code_without_a_file() -> None:
    def make(shift: int) -> Any:
        return lambda h, k, vision, t, budget, /, **pivots: vision.roll(shift)

    register_selector("one")(make(1))
    register_selector("two")(make(2))
    assert selector_fingerprint("one") != selector_fingerprint("two")
    for name, body in (("typed", "v"), ("retyped", "(lambda x: x | False)(v)")):
        space: dict[str, Any] = {}
        exec(f"def f(h, k, v, t, b, **pivots): return {body}", space)
        register_selector(name)(space["f"])
    assert selector_fingerprint("typed") != selector_fingerprint("retyped")
    assert len({selector_fingerprint(name) for name in BUILT_IN}) == len(BUILT_IN)
