"""The graphs in the docstrings of rewriting passes match the golden texts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER, PASSES = Path(__file__).parent, Path(__file__).parents[3] / "passes"
DISTRIBUTED = ("to_local_tensors", "sync_selection")


def rewriting_files() -> list[Path]:
    found = [
        f for folder in ("frontend", "transform", "dropped") for f in (PASSES / folder).glob("*.py")
    ]
    found += [PASSES / "distributed" / f"{name}.py" for name in DISTRIBUTED]
    return sorted(f for f in found if f.name != "__init__.py")


@pytest.mark.parametrize("file", rewriting_files(), ids=lambda file: file.stem)
def test_the_graphs_in_a_docstring_are_those_of_the_golden_text(file: Path) -> None:
    """``...`` in the docstring stands for any text."""
    golden_lines = [
        line.lstrip("+- ")
        for text in FOLDER.glob(f"{file.stem}*.txt")
        for line in text.read_text().splitlines()
    ]
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    quoted = re.findall(r"^    (\S.*)$", doc, re.MULTILINE)
    assert len(quoted) >= 2, "the graph before and after"
    for line in quoted:
        pattern = re.escape(line).replace(r"\.\.\.", ".*")
        assert any(re.fullmatch(pattern, found) for found in golden_lines), line
