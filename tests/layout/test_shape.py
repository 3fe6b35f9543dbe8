"""The shape of the code: sizes of files, functions and folders; test_arrows.py holds the imports.

Read from the files; nothing is imported.  Each rule has a list of what breaks it today.  The lists
only get shorter: one line too many fails the test, and none is ever added.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.layout.test_layout import ROOT, imported, sources

LARGEST_FILE, LARGEST_FUNCTION, LARGEST_FOLDER = 300, 40, 12

# A kernel is one function, however long.
TRITON_KERNELS = {
    "dartfx/ops/triton_kernels.py",
    *(f"dartfx/ops/{folder}/kernels.py" for folder in ("covering", "farthest")),
}

LARGE_FILES: set[str] = set()

LARGE_FUNCTIONS: set[str] = set()

LARGE_FOLDERS: set[str] = set()


def all_sources() -> Iterator[Path]:
    yield from sources("dartfx", "passes", "tests", "examples")


def product() -> dict[str, str]:
    """The text of every file of dartfx and its passes, by path."""
    return {shown(path): path.read_text() for path in sources("dartfx", "passes")}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def only_exceptions(found: set[str], exceptions: set[str]) -> None:
    """Fail for what breaks a rule and is not listed, and for what is listed and no longer does."""
    assert found - exceptions == set()
    assert exceptions - found == set(), "no longer an exception: remove it from the list"


def test_sizes_of_files() -> None:
    large = {shown(p) for p in all_sources() if len(p.read_text().splitlines()) > LARGEST_FILE}
    only_exceptions(large - TRITON_KERNELS, LARGE_FILES)


def test_sizes_of_functions() -> None:
    large = {
        f"{shown(path)} {node.name}"
        for path in all_sources()
        if shown(path) not in TRITON_KERNELS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or 0) - node.lineno >= LARGEST_FUNCTION
    }
    only_exceptions(large, LARGE_FUNCTIONS)


def test_sizes_of_folders() -> None:
    counts: dict[str, int] = {}
    for path in all_sources():
        counts[shown(path.parent)] = counts.get(shown(path.parent), 0) + 1
    large = {folder for folder, count in counts.items() if count > LARGEST_FOLDER}
    only_exceptions(large, LARGE_FOLDERS)


def test_no_mock_in_the_product() -> None:
    found = {path for path, source in product().items() if "mock" in ast_names(source)}
    assert found == set()


def ast_names(source: str) -> set[str]:
    """Every name and every part of a dotted name that ``source`` imports."""
    return {part for _, name in imported(source, "module") for part in name.split(".")}
