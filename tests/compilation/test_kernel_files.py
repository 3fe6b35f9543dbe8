"""C++ kernels that share a file compute what they do alone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from dartfx.backend import kernel_files
from dartfx.backend.kernel_files import Kernel

KERNELS = 3


def three(x: Tensor) -> tuple[Tensor, ...]:
    """Three kernels: a softmax, its columns' sums, and the maxima of a product's rows."""
    scores = x.softmax(-1)
    return scores, (scores @ scores).amax(-1), (scores.t() @ x).sin().sum(0)


def compiled(backend: str, threads: int = 1) -> tuple[tuple[Tensor, ...], int]:
    """What the compiled function returns, and the number of C++ files of its kernels."""
    torch.compiler.reset()
    x = torch.linspace(-3, 3, 32 * 32).reshape(32, 32).cos()
    with fresh_cache(), config.patch(compile_threads=threads), torch.no_grad():
        result = torch.compile(three, backend=backend)(x)
        files = len(list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.main.cpp")))
    return result, files


@pytest.fixture(scope="module")
def alone() -> tuple[Tensor, ...]:
    result, files = compiled("inductor")
    assert files == KERNELS
    return result


def equal(given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, given, wanted))


def test_kernels_share_a_file(alone: tuple[Tensor, ...]) -> None:
    result, files = compiled("dart")
    assert files == 1
    assert equal(result, alone)


def test_files_are_compiled_in_threads(
    alone: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_files, "AT_ONCE", 2)
    result, files = compiled("dart", threads=2)
    assert files == 2
    assert equal(result, alone)


def test_a_file_that_does_not_compile_costs_time_only(
    alone: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_files, "_text", lambda kernels: "no C++")
    with caplog.at_level(logging.WARNING, logger=kernel_files.__name__):
        result, files = compiled("dart")
    assert files == 1 + KERNELS
    assert equal(result, alone)
    assert "every kernel is compiled as a file" in caplog.text


HEAD = "\n#include <torch/csrc/inductor/cpp_prefix.h>\n"
BODY = 'extern "C"  void  kernel(float* out_ptr0)\n{\n}\n'


@pytest.mark.parametrize(
    ("source", "may"),
    [
        (HEAD + BODY, True),
        ("#include <mkl.h>\n" + HEAD + BODY, False),
        (HEAD + "#define N 4\n" + BODY, False),
        (HEAD + "inline void kernel(int n);\n" + BODY, False),
        (HEAD + BODY.replace("void", "int"), False),
    ],
)
def test_only_plain_kernels_share(source: str, may: bool) -> None:
    assert Kernel([], source).may_share is may
