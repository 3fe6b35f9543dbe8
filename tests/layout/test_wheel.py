"""The built packages: their contents, and that a clean environment finds the backend by name."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A PYTHONPATH that leads to the checkout would hide what was installed.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

# Torch must find the backend by its entry point alone, next to a user's own passes.py.
FIRST_USE = """
import sys
import torch

assert "dart" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "dartfx" not in sys.modules

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
x = torch.randn(2, 4)
compiled = torch.compile(model, backend="dart", options={"lowering": "eager"})
torch.testing.assert_close(compiled(x), model(x))

import dartfx
import dartfx.passes
print(dartfx.__file__)
print(dartfx.passes.__file__)
print("decoy imported" if "passes" in sys.modules else "decoy ignored")
"""

MISSPELT = """
import torch

torch.compile(torch.nn.Linear(4, 4), backend="dart", options={"retain_token": 4})(torch.ones(1, 4))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it, as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def clean_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds only the wheel, and borrows torch."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # Only now: pip must not see the checkout's own install. A path that a .pth file adds comes
    # after the environment's packages, and the .pth files inside it are not read, so the editable
    # install of the checkout stays out of reach.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site,) = home.glob("lib/python3.*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder with a module of their own that is called passes."""
    (tmp_path / "passes.py").write_text("raise RuntimeError('a module of the user, not ours')\n")
    return tmp_path


def test_wheel_and_sdist_hold_the_passes_as_real_files(built: Path) -> None:
    ours = {path.name: path.read_bytes() for path in (ROOT / "passes").glob("*.py")}
    assert "__init__.py" in ours
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, content in ours.items():
            assert archive.read(f"dartfx/passes/{name}") == content
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert "dartfx/py.typed" in archive.namelist()
        assert "dartfx/observe/html/templates/report.html.jinja" in archive.namelist()
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dartfx"}

    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        base = sdist.name.removesuffix(".tar.gz")
        for name, content in ours.items():
            member = archive.getmember(f"{base}/dartfx/passes/{name}")
            assert member.isfile()
            stored = archive.extractfile(member)
            assert stored is not None
            assert stored.read() == content


def test_a_clean_environment_finds_the_backend_by_name(clean_python: Path, elsewhere: Path) -> None:
    script = elsewhere / "first_use.py"
    script.write_text(FIRST_USE)
    package, passes, decoy = run(clean_python, script, cwd=elsewhere).split("\n")[:3]
    home = clean_python.parent.parent
    assert Path(package).is_relative_to(home)
    assert Path(passes).is_relative_to(home)
    assert decoy == "decoy ignored"


def test_a_misspelt_option_names_the_nearest(clean_python: Path, elsewhere: Path) -> None:
    script = elsewhere / "misspelt.py"
    script.write_text(MISSPELT)
    command = [clean_python, script]
    done = subprocess.run(command, cwd=elsewhere, env=CLEAN, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ConfigError" in done.stderr
    assert "did you mean 'retain_tokens'?" in done.stderr
