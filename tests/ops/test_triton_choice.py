"""Choice of implementation, the operator's refusals, and detection of edited kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dartfx.config import fingerprint
from dartfx.errors import KernelUnavailableError, SelectionError
from dartfx.ops import triton_launch
from dartfx.ops.registration import _WRONG_COUNT, TEXT_LOST, assertion, choose_kernel, require_rows
from tests.support.selection_cases import operator, plain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_cuda_and_torch_elsewhere() -> None:
    pytest.importorskip("triton")
    assert choose_kernel("auto", CUDA) == "triton"
    assert choose_kernel("auto", CUDA, lambda: "hidden is too long") == "torch"
    assert choose_kernel("torch", CUDA) == "torch"
    assert choose_kernel("auto", CPU) == choose_kernel("auto", torch.device("xpu")) == "torch"


def test_triton_by_name_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert choose_kernel("triton", CUDA) == "triton"
    with pytest.raises(KernelUnavailableError, match="serves CUDA and ROCm devices, not cpu"):
        choose_kernel("triton", CPU)
    with pytest.raises(KernelUnavailableError, match="hidden is too long; use kernel='auto'"):
        choose_kernel("triton", CUDA, lambda: "hidden is too long")
    monkeypatch.setattr(triton_launch, "_triton_installed", lambda: False)
    assert choose_kernel("auto", CUDA) == "torch"
    with pytest.raises(KernelUnavailableError, match="Triton is not installed"):
        choose_kernel("triton", CUDA)


def test_auto_is_torch_where_triton_cannot_be_imported() -> None:
    code = """
        import sys, torch
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ImportError("no triton here")
        for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Block())
        from dartfx.ops.registration import choose_kernel
        assert choose_kernel("auto", torch.device("cuda")) == "torch"
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"N": 0}, "vision_tokens must be at least 1, got 0"),
        ({"N": -3}, "vision_tokens must be at least 1, got -3"),
        ({"N": 41}, "vision_tokens must be at most S = 40 of hidden, got 41"),
        ({"retain": -1}, "retain must be at least 0, got -1"),
    ],
)
def test_the_operator_names_the_count_and_its_limit(
    kernel: str, change: dict[str, int], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        operator({**plain(), **change}, kernel=kernel)


def test_rows_are_checked_by_one_assertion_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda ok, text: seen.append((ok.numel(), text)))
    value = torch.empty(3, 4, dtype=torch.int64, device="meta")
    for rows in (1, 3, 40):
        ok: Tensor = torch.empty(rows, dtype=torch.bool, device="meta")
        copy = require_rows._init_fn(value, ok, "row {row} is lost")
        assert copy.shape == value.shape
    assert seen == [
        *((1, "row 0 is lost"), (1, "row (one of 3) is lost"), (1, "row (one of 40) is lost"))
    ]


def test_messages_fit_into_an_assertion_on_a_device() -> None:
    """CUDA's takes fewer than 255 characters, and raises for more before anything runs."""
    for message in (TEXT_LOST, _WRONG_COUNT.format(who="selector 'key_norm'")):
        assert "..." not in assertion(message, 999_999)
    for length in (250, 254, 255, 400):
        shown = assertion("x" * length, 2)
        assert len(shown) <= 254
        assert shown.startswith("x" * min(length, 250))


def test_an_edited_kernel_changes_what_compile_caches_are_keyed_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Path(fingerprint.__file__).parents[1]
    copy = shutil.copytree(package, tmp_path / "dartfx", ignore=shutil.ignore_patterns("*.pyc"))
    read = fingerprint.source_digest.__wrapped__
    monkeypatch.setattr(fingerprint, "__file__", str(copy / "config" / "fingerprint.py"))
    before = read()
    kernels = copy / "ops" / "triton_kernels.py"
    kernels.write_text(kernels.read_text().replace("tl.abs(", "(", 1))
    assert read() != before
