"""Compiled C++ files of this process's graphs, and those that another process saved.

Inductor knows such a file by its text, the compiler's command line and the vector instructions that
were tried, so that it starts the compiler even where the file exists.  Here it is known by its text
and Inductor's settings, and may only be used where :func:`unfit` finds nothing.
"""

from __future__ import annotations

import hashlib
import platform
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from dartfx import compat
from dartfx.config.fingerprint import canonical
from dartfx.observe.folders import write

__all__ = ["built_by", "compiled", "find", "give", "key_of", "note", "settings", "unfit"]

_FOLDER = "dartfx_kernels"

# The files that graphs of this process run, and those that its next graphs may run.
_noted: dict[str, Path] = {}
_given: dict[str, Path] = {}
_compilers: list[str] = []  # of the files given


def settings() -> str:
    """All that Inductor is told about a compilation, before it changes that for itself."""
    # Without a name for its config no two are equal.
    portable = getattr(compat.find("inductor_config"), "save_config_portable", object)()
    return canonical([portable, torch.compiler.config.cache_key_tag])


def key_of(text: str, settings: str) -> str:
    """What the file that was compiled from this text, with these settings, is known by."""
    return hashlib.sha256(f"{settings}\0{text}".encode()).hexdigest()


def note(key: str, file: str) -> None:
    """Note a file that a graph of this process runs."""
    _noted[key] = Path(file)


def compiled() -> dict[str, bytes]:
    """The content of every file noted; those that were deleted since are left out."""
    return {key: file.read_bytes() for key, file in _noted.items() if file.is_file()}


def give(contents: Mapping[str, bytes], made: Mapping[str, list[str]]) -> None:
    """Let graphs of this process run these files, built by ``made``, instead of compiling them."""
    _compilers[:] = made["compiler"]
    folder = Path(compat.cache_dir(), _FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in contents.items():
        file = folder / f"{key}.so"
        write(file, content)  # not in place: another process may have it loaded
        _given[key] = file


def find(key: str) -> str | None:
    """The file that was given for a key, if it is still there."""
    file = _given.get(key)
    return str(file) if file is not None and file.is_file() else None


def built_by() -> dict[str, list[str]]:
    """The compiler, and the processor whose instructions ``-march=native`` lets it use."""
    return {"compiler": _compiler() or _compilers, "processor": _processor()}


def unfit(made: Mapping[str, list[str]]) -> str:
    """What this machine lacks to run files that were built by ``made``; "" if nothing.

    A machine without a compiler runs any compiler's files: it could not have others.
    """
    here = {"compiler": _compiler() or made["compiler"], "processor": _processor()}
    lacking = {name: set(made[name]) - set(here[name]) for name in here}
    return ", ".join(f"{name} {' '.join(sorted(each))}" for name, each in lacking.items() if each)


def _compiler() -> list[str]:
    """The version of Inductor's compiler; empty where there is none."""
    try:
        said = compat.get_compiler_version_info(compat.get_cpp_compiler())
    except compat.errors("InvalidCxxCompiler"):
        return []
    # Inductor joins lines by underscores; one of them is "gcc version 12.2.0 (Debian 12.2.0-14)".
    return re.findall(r"[A-Za-z+]+ version [^_]*", said)[-1:] or [said]


def _processor() -> list[str]:
    """The model and the instructions of the processor, as far as the system says."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    known = re.findall(r"^(vendor_id|cpu family|model|CPU [a-z]+)\s*: (.*)$", first, re.MULTILINE)
    flags = re.findall(r"^(?:flags|[Ff]eatures)\s*: (.*)$", first, re.MULTILINE)
    model = [f"{name} {value}" for name, value in known] or [platform.processor()]
    found = [*filter(None, model), *(each for line in flags for each in line.split())]
    return found or [uuid.uuid4().hex]  # like no other
