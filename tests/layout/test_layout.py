"""Where things live and who may import whom: read from the files, nothing is imported."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running.order import LONGEST

ROOT = Path(__file__).parents[2]

# The compiler's arrows: it names operators as torch.ops.dartfx.*, reaches private names of torch
# through dartfx.compat, and knows nothing else of dartfx.
PASSES_MAY_IMPORT = {
    "torch",
    "networkx",
    "sympy",
    "dartfx.passes",
    "dartfx.compat",
    *sys.stdlib_module_names,
}
PASSES_MUST_NOT_IMPORT = {"torch._inductor"}

# What the backend is built from must not reach back up to it.
FOUNDATIONS = ["errors.py", "config", "selection", "ops"]
FOUNDATIONS_MUST_NOT_IMPORT = {"dartfx.backend", "dartfx.passes"}

# Tiny models of many families, for tests and one command; the only place that may name models.
ZOO = "dartfx.tools.zoo"

# The product must serve models nobody listed, so no code may ask which model it has.
MODEL_NAMES = [
    "aria",
    "aya_vision",
    "blip",
    "gemma",
    "glm4v",
    "idefics",
    "image_token_id",
    "image_token_index",
    "internvl",
    "kimi",
    "llava",
    "mistral",
    "ovis",
    "paligemma",
    "phi4",
    "pixtral",
    "qwen",
    "smolvlm",
    "text_config",
    "video_token",
    "vision_config",
]


def sources(*places: str) -> Iterator[Path]:
    """Every Python file in ``places``; dartfx/passes is a link and is listed as passes/ only."""
    for place in places:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def module_of(path: Path) -> str:
    """The name that ``path`` is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, "dartfx")
    return ".".join(parts)


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that ``source``, a file imported as ``module``, imports.

    ``from a import b`` gives ``a.b``, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def code_only(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every token that is neither a comment nor a docstring."""
    docstrings = {
        (node.body[0].value.lineno, node.body[0].value.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if ast.get_docstring(node, clean=False) is not None and isinstance(node.body[0], ast.Expr)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.start not in docstrings:
            yield token.start[0], token.string


def model_names(source: str) -> Iterator[tuple[int, str]]:
    for line, text in code_only(source):
        # Only where a word begins: "invariant" does not name a model.
        found = re.finditer(rf"(?<![a-z])({'|'.join(MODEL_NAMES)})", text.lower())
        yield from ((line, match[1]) for match in found)


def test_passes_is_one_folder_under_two_paths() -> None:
    link = ROOT / "dartfx" / "passes"
    advice = (
        "dartfx/passes must be a symlink to ../passes. This checkout was made without symlinks: "
        "run 'git config core.symlinks true && git checkout -- dartfx/passes', or unpack it with a "
        "tool that keeps links"
    )
    assert link.is_symlink(), advice
    assert str(link.readlink()) == "../passes", advice
    assert (link / "__init__.py").samefile(ROOT / "passes" / "__init__.py"), advice


def test_passes_refuses_to_be_a_second_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "'dartfx.passes'" in done.stderr


def test_passes_imports_torch_graphs_and_itself() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("passes")
        for line, name in imported(path.read_text(), module_of(path))
        if not within(name, PASSES_MAY_IMPORT) or within(name, PASSES_MUST_NOT_IMPORT)
    ]
    assert wrong == []


def test_foundations_do_not_import_what_stands_on_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(*(f"dartfx/{place}" for place in FOUNDATIONS))
        for line, name in imported(path.read_text(), module_of(path))
        if within(name, FOUNDATIONS_MUST_NOT_IMPORT)
    ]
    assert wrong == []


def product() -> Iterator[Path]:
    """Every Python file of dartfx and its passes but those of the zoo."""
    for path in sources("dartfx", "passes"):
        if not within(module_of(path), {ZOO}):
            yield path


def test_only_the_zoo_imports_the_zoo() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in product()
        for line, name in imported(path.read_text(), module_of(path))
        if within(name, {ZOO})
    ]
    assert wrong == []
    assert any(path.is_relative_to(ROOT / "dartfx" / "tools" / "zoo") for path in sources("dartfx"))


def test_no_code_names_a_model() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} says {name!r}"
        for path in product()
        for line, name in model_names(path.read_text())
    ]
    assert wrong == []


def test_the_file_lists_above_are_not_empty() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in sources("dartfx", "passes")}
    assert {"dartfx/config/options.py", "passes/__init__.py"} <= found
    assert all((ROOT / "dartfx" / place).exists() for place in FOUNDATIONS)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import triton.language as tl", "triton.language"),
        ("from torch import _inductor", "torch._inductor"),
        ("from torch._inductor.compile_fx import compile_fx", "torch._inductor.compile_fx"),
        ("from ...errors import ConfigError", "dartfx.errors"),
        ("from ... import backend", "dartfx.backend"),
        ("from dartfx import backend", "dartfx.backend"),
        ("def f():\n    import transformers", "transformers"),
    ],
)
def test_the_import_rule_sees(line: str, name: str) -> None:
    ((_, found),) = imported(line, "dartfx.passes.analysis.token_axes")
    assert within(found, {name})
    assert not within(found, PASSES_MAY_IMPORT) or within(found, PASSES_MUST_NOT_IMPORT)


@pytest.mark.parametrize("line", ["from ..site import Site", "from dartfx.passes import site"])
def test_the_import_rule_allows(line: str) -> None:
    ((_, found),) = imported(line, "dartfx.passes.analysis.token_axes")
    assert within(found, {"dartfx.passes.site"})
    assert within(found, PASSES_MAY_IMPORT)


def test_the_model_name_rule_reads_code_and_skips_prose() -> None:
    source = '''"""Docstring: llava."""
x = 1  # comment: qwen
def f():
    """gemma"""
    invariant = "QwenModel"
    return config.image_token_id
'''
    assert list(model_names(source)) == [(5, "qwen"), (6, "image_token_id")]


def test_the_files_that_run_first_are_there() -> None:
    missing = [name for name in LONGEST if not (ROOT / "tests" / name).is_file()]
    assert missing == []


def test_the_candidate_of_kernels_fits_the_kernels() -> None:
    check = ["git", "apply", "--check", "docs/kernel_candidate.patch"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"adapt or remove docs/kernel_candidate.patch: {done.stderr}"
