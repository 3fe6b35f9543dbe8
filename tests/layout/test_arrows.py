"""Imports go one way, without cycles, and use private names of other packages in one file only.

Read from the files; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.layout.test_layout import imported, module_of, sources
from tests.layout.test_shape import product

# Folders and files of dartfx from the lowest up: each imports only from lines above its own, at the
# top of a file, inside functions, for type checkers and by names in strings alike.  Below "dartfx",
# the package itself, nothing may import the package as its users do.
RANKS = """
    errors _version
    compat
    selection
    ops
    config
    passes
    runtime
    observe
    backend
    token_map
    model
    replay verification export
    dartfx
    integrations
    tools
    cli
    __main__
""".strip().splitlines()
RANK = {name: rank for rank, line in enumerate(RANKS) for name in line.split()}

# Where torch and transformers may be reached behind their public names.
COMPAT = "dartfx/compat.py"


@cache
def modules() -> dict[str, Path]:
    """Every module of dartfx by the name it is imported by."""
    found = {module_of(path): path for path in sources("dartfx", "passes")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


@cache
def arrows() -> set[tuple[str, str]]:
    """(module, module that it names): imported anywhere in it, or spelled out in a string."""
    found = set()
    for module, path in modules().items():
        source = path.read_text()
        names = {name for _, name in imported(source, module_of(path))} | named(source)
        found |= {(module, owner(name)) for name in names if name.split(".")[0] == "dartfx"}
    return {(one, other) for one, other in found if one != other}


def named(source: str) -> set[str]:
    """Modules that ``source`` names in strings, as ``import_module`` takes them."""
    texts = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    found = {text for text in texts if isinstance(text, str) and "." in text}
    return found & set(modules())


def owner(name: str) -> str:
    """The module that a dotted name is, or is in."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def folder(module: str) -> str:
    """What of RANKS a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_imports_go_one_way() -> None:
    unknown = {folder(module) for module in modules()} - set(RANK)
    assert unknown == set(), "give it a line in RANKS"
    pairs = {(folder(one), folder(other)) for one, other in arrows()}
    # The package is what its users see; it takes that from where it is made, which is below it.
    up = {f"{a} -> {b}" for a, b in pairs if a != b and RANK[b] >= RANK[a]}
    assert up == set()


def test_no_module_imports_itself_through_others() -> None:
    graph = nx.DiGraph(arrows())
    circles = [found for found in nx.strongly_connected_components(graph) if len(found) > 1]
    assert circles == []


def private_names(source: str) -> set[str]:
    """Dotted names of torch with a private part, and inner modules of transformers."""
    tree = ast.parse(source)
    dotted = {name for _, name in imported(source, "module")}
    dotted |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    torch = {name for name in dotted if re.fullmatch(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*", name)}
    # Names of operators may begin with an underscore; they are public all the same.
    torch -= {name for name in torch if name.startswith("torch.ops.")}
    inner = {name for name in dotted if re.match(r"transformers\.[a-z_]+\.", name)}
    return torch | inner


def test_no_private_names_of_torch_and_transformers() -> None:
    found = {path for path, source in product().items() if private_names(source)}
    assert found == {COMPAT}


@pytest.mark.parametrize(
    "line",
    [
        "from torch._inductor import config",
        "import torch._dynamo",
        "def f():\n    torch._dynamo.reset()",
        "from torch.utils._pytree import tree_map",
        "from transformers.utils.generic import OutputRecorder",
    ],
)
def test_the_rule_of_private_names_sees(line: str) -> None:
    assert private_names(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.__version__",
        "torch.ops.aten._softmax.default",
        "from transformers import AutoProcessor",
        "from torch.fx import Graph",
        "module._orig_mod",
    ],
)
def test_the_rule_of_private_names_allows(line: str) -> None:
    assert private_names(line) == set()


def test_arrows_see_every_kind_of_import() -> None:
    assert ("dartfx.cli.main", "dartfx.cli.doctor") in arrows()  # a name in a string
    assert ("dartfx.config.options", "dartfx.errors") in arrows()
    assert ("dartfx", "dartfx.verification.verify") in arrows()  # lazily
