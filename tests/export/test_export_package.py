"""Pruned programs packaged by AOTInductor: run without dartfx, and without Python."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch.export import Dim
from torch.utils import _pytree as pytree

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from tests.support.exporting import Inputs, Prefill, export
from tests.support.tolerances import CLOSE, RETAIN

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a g++"),
    # Inductor copies a graph whose signature holds what it warns of.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is dep:FutureWarning"),
]

ALONE = """
import sys
import torch

package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
good, bad = torch.load(inputs)
torch.save(model(**good), outputs)
try:
    model(**bad)
except RuntimeError as error:
    print("refused:", error)
print("imported:", sorted({"transformers", "dartfx"} & set(sys.modules)))
"""


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile() -> Iterator[None]:
    """The wrapper around the kernels is most of a package's C++; how fast it runs is no subject."""
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


@pytest.fixture(scope="module")
def package(llava: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of batch 2 and any length."""
    length = {1: Dim("length", min=20, max=300)}
    sizes = {"input_ids": length, "attention_mask": length, "pixel_values": None}
    program = export(Prefill(llava.model), llava.make_inputs("pad2"), dynamic=sizes)
    pruned = dartfx.prune_exported(program, retain_tokens=RETAIN)
    path = tmp_path_factory.mktemp("package") / "pruned.pt2"
    torch._inductor.aoti_compile_and_package(pruned, package_path=str(path))
    return path


def uneven(family: Family, inputs: Inputs) -> Inputs:
    """The same batch with two vision tokens less in row 1 and two more in row 0."""
    ids, image = inputs["input_ids"].clone(), family.image_token_id
    ids[1, (ids[1] == image).nonzero()[-2:]] = 5
    last = int((ids[0] == image).nonzero()[-1])
    ids[0, last + 1 : last + 3] = image
    return inputs | {"input_ids": ids}


def assert_same(outputs: list[torch.Tensor], family: Family, inputs: Inputs) -> None:
    wanted = hooked.pruned_forward(family.model, inputs, retain=RETAIN, kv_layout="uniform")
    caches = [t for pair in zip(wanted.keys, wanted.values, strict=True) for t in pair]
    for found, expected in zip(outputs, [wanted.logits, *caches], strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_in_a_process_without_dartfx(llava: Family, package: Path, tmp_path: Path) -> None:
    inputs = llava.make_inputs("pad2", length=40)
    given, returned = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    torch.save((inputs, uneven(llava, inputs)), given)
    command = [sys.executable, "-c", ALONE, str(package), str(given), str(returned)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(pytree.tree_leaves(torch.load(returned)), llava, inputs)
    # What the assertion received is the row; the message itself is left out by the compiler.
    assert "received 0" in done.stdout or "received 1" in done.stdout
    assert "imported: []" in done.stdout


def test_from_cpp(llava: Family, package: Path, tmp_path: Path) -> None:
    program = tmp_path / "run_package"
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    built = subprocess.run(
        [
            "g++", "-std=c++20", "-O0", str(ROOT / "examples" / "run_package.cpp"),
            f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", "-o", str(program),
            f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed",
            "-ltorch", "-ltorch_cpu", "-lc10",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    inputs, given, returned = llava.make_inputs("pad2"), tmp_path / "in.pt", tmp_path / "out.pt"
    order = ("input_ids", "attention_mask", "pixel_values")

    def run(inputs: Inputs) -> subprocess.CompletedProcess[str]:
        torch.save([inputs[name] for name in order], given)
        command = [str(program), str(package), str(given), str(returned)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(inputs)
    assert done.returncode == 0, done.stderr
    assert "float [2, 19, 200]" in done.stdout
    assert_same(torch.load(returned), llava, inputs)
    refused = run(uneven(llava, inputs))
    assert refused.returncode == 1
    assert "received" in refused.stderr


def test_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("export_llava")
    example.main(["--size", "tiny", "--repeat", "1", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "70 -> 58 tokens, 16 -> 4 vision tokens" in text
    for name in ("plain", "pruned"):
        assert f"{name}.pt2: " in text
        assert (tmp_path / f"{name}.pt2").stat().st_size > 1000
    assert "x faster, medians of 1 in turns" in text
    [apart] = [line.split("by ")[1].split(" ")[0] for line in text.splitlines() if "loaded" in line]
    assert float(apart) < 1e-4
