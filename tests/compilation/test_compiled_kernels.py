"""Compiled C++ kernels that were saved are run where they fit, and only there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from torch import Tensor
from torch._inductor import config, cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import dartfx
from dartfx.backend.kernel_files import Kernel
from dartfx.backend.warm_start import cache_files
from dartfx.backend.warm_start import compiled_kernels as kernels
from tests.compilation.test_kernel_files import KERNELS, compiled, equal

Result = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    for name, value in (("_noted", {}), ("_given", {}), ("_compilers", [])):
        monkeypatch.setattr(kernels, name, value)


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, bytes], Result]:
    """The compiled file of three kernels, and what these compute."""
    with pytest.MonkeyPatch.context() as patch:
        contents: dict[str, bytes] = {}
        # Their folder is deleted as soon as they have run.
        patch.setattr(kernels, "note", lambda key, file: contents.update({key: read(file)}))
        result, files = compiled("dart")
    assert files == len(contents) == 1
    return contents, result


def read(file: str) -> bytes:
    return Path(file).read_bytes()


def test_a_given_file_is_not_compiled(saved: tuple[dict[str, bytes], Result]) -> None:
    contents, wanted = saved
    kernels.give(contents, kernels.built_by())
    result, files = compiled("dart")
    assert files == 0
    assert equal(result, wanted)
    assert kernels.compiled() == contents  # to be saved again


@pytest.mark.parametrize(
    "setting", [{"cpp.enable_unsafe_math_opt_flag": True}, {"cpp.simdlen": 0}], ids=str
)
def test_not_with_other_flags(setting: dict[str, object]) -> None:
    kernels.give({kernels.key_of("text", kernels.settings()): b""}, kernels.built_by())
    assert kernels.find(kernels.key_of("text", kernels.settings()))
    assert not kernels.find(kernels.key_of("other text", kernels.settings()))
    with config.patch(setting):
        assert not kernels.find(kernels.key_of("text", kernels.settings()))


def test_kernels_that_share_no_file_are_saved_too(
    saved: tuple[dict[str, bytes], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernel, "may_share", False)
    contents: dict[str, bytes] = {}
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "note", lambda key, file: contents.update({key: read(file)}))
        assert compiled("dart")[1] == len(contents) == KERNELS
    kernels.give(contents, kernels.built_by())
    result, files = compiled("dart")
    assert files == 0
    assert equal(result, saved[1])


def test_a_damaged_library_costs_time_only(
    saved: tuple[dict[str, bytes], Result],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_FOLDER", "damaged")  # Python loads a path once
    for module in [name for name in sys.modules if name.startswith(tuple(saved[0]))]:
        monkeypatch.delitem(sys.modules, module)
    kernels.give(dict.fromkeys(saved[0], b"no library"), kernels.built_by())
    with caplog.at_level(logging.WARNING):
        result, files = compiled("dart")
    assert files == KERNELS
    assert equal(result, saved[1])
    assert "every kernel is compiled as a file" in caplog.text


def test_a_deleted_library_is_compiled(saved: tuple[dict[str, bytes], Result]) -> None:
    kernels.give(saved[0], kernels.built_by())
    for file in kernels._given.values():
        file.unlink()
    assert compiled("dart")[1] == 1


def test_what_this_machine_lacks_is_named() -> None:
    here = kernels.built_by()
    assert all(here.values())
    assert kernels.unfit(here) == ""
    assert kernels.unfit({**here, "processor": here["processor"][1:]}) == ""
    other = {"compiler": ["gcc version 99"], "processor": [*here["processor"], "avx9"]}
    assert kernels.unfit(other) == "compiler gcc version 99, processor avx9"


def test_a_machine_without_a_compiler_runs_the_files_of_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    made = {**kernels.built_by(), "compiler": ["gcc version 99"]}
    assert kernels.unfit(made) == ""
    kernels.give({}, made)
    assert kernels.built_by() == made  # where this process saves them


def test_files_that_do_not_fit_are_not_given(
    saved: tuple[dict[str, bytes], Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels.give(saved[0], kernels.built_by())
    kernels._noted.update(kernels._given)
    dartfx.save_cache(tmp_path / "cache")
    kernels._given.clear()
    dartfx.load_cache(tmp_path / "cache")
    assert kernels._given.keys() == saved[0].keys()
    kernels._given.clear()
    monkeypatch.setattr(kernels, "_processor", lambda: ["an older one"])
    with caplog.at_level(logging.WARNING, logger=cache_files.__name__):
        dartfx.load_cache(tmp_path / "cache")
    assert "compiled again: here is no processor" in caplog.text
    assert not kernels._given
