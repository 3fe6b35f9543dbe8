"""``import dartfx`` and the entry point load only what compiling needs."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import dartfx

# Prints what the statement loads beyond dynamo, which torch.compile needs in any case.
PROGRAM = """
import sys
import torch._dynamo
before = set(sys.modules)
{statement}
torch.ops.dartfx.select_tokens.default, torch.ops.dartfx.keep_given.default
print(*sorted(set(sys.modules) - before), sep="\\n")
"""

LOADS = {
    "import dartfx": "import dartfx",
    "entry point": (
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='torch_dynamo_backends', name='dart')\n"
        "point.load()"
    ),
}

# Pages, pictures, verification, exported programs, trial runs and the command line.
SELDOM = {
    "dartfx.cli",
    "dartfx.export.program",
    "dartfx.export.prune_exported",
    "dartfx.integrations",
    "dartfx.observe.html",
    "dartfx.passes.frontend.exported",
    "dartfx.replay",
    "dartfx.token_map.overlay",
    "dartfx.tools",
    "dartfx.verification",
}


@pytest.mark.parametrize("statement", LOADS.values(), ids=LOADS.keys())
def test_nothing_is_loaded_that_compiling_can_do_without(statement: str) -> None:
    program = PROGRAM.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "dartfx.backend" in loaded
    assert not loaded & SELDOM
    # Not jinja2, networkx, matplotlib, transformers or Inductor: dartfx and Python's own only.
    packages = {module.partition(".")[0] for module in loaded}
    assert packages - sys.stdlib_module_names == {"dartfx"}


def test_what_is_said_to_be_seldom_exists() -> None:
    found = {m.name for m in pkgutil.walk_packages(dartfx.__path__, "dartfx.")}
    assert found >= SELDOM


def test_every_public_name_is_listed_and_found() -> None:
    assert set(dartfx.__all__) <= set(dir(dartfx))
    for name in dartfx.__all__:
        assert callable(getattr(dartfx, name))
    assert not hasattr(dartfx, "no_such_name")
