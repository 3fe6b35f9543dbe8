"""torch's compiled code in a file, from which other processes start warm."""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import sysconfig
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dartfx.backend.warm_start import compiled_kernels
from dartfx.config.fingerprint import source_digest
from dartfx.errors import DartfxError, InputError
from dartfx.observe.folders import write

__all__ = ["load_cache", "save_cache"]

log = logging.getLogger(__name__)

_FORMAT = "dartfx compile cache 2"
_HEAD, _ARTIFACTS, _KERNELS = "head.json", "artifacts", "kernels/"


def save_cache(path: str | os.PathLike[str]) -> None:
    """Write all that ``torch.compile`` compiled in this process so far to a file.

    For images of containers: call the model once for every kind of prompt, save, and call
    :func:`load_cache` in the container before the first call.  The file holds torch's artifacts
    and, for a CPU, the compiled C++ kernels of the graphs that dartfx compiled here or took over
    from another file: those of other backends are compiled again.  All of it is code that runs, and
    serves processes with the same options, versions and processor only.  Raises DartfxError where
    nothing was compiled, or only by a lowering that has no cache.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise DartfxError(
            'there is nothing to save: call the compiled model first, with lowering="inductor"'
        )
    kernels = compiled_kernels.compiled()
    head = {"format": _FORMAT, **_required(), "kernels": compiled_kernels.built_by()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_HEAD, json.dumps(head))
        archive.writestr(_ARTIFACTS, saved[0])
        for key, kernel in kernels.items():
            archive.writestr(_KERNELS + key, kernel)
    write(Path(path), content.getvalue())


def load_cache(path: str | os.PathLike[str]) -> None:
    """Load compiled code that :func:`save_cache` wrote; load trusted files only.

    Whoever wrote the file runs code in this process: torch unpickles its artifacts and executes the
    Python in them, and the C++ kernels are shared libraries, written to Inductor's cache folder.
    Kernels that another C++ compiler built, or for instructions that this processor lacks, are left
    aside with a warning and compiled again; where all fit, no compiler is needed.  Graphs that the
    file does not hold are compiled as usual.  Raises InputError for a file that is none of
    save_cache's, or that was made by other versions or for another processor, naming them.
    """
    head, artifacts, kernels = _read(Path(path))
    here = _required()
    if differs := [name for name in here if head.get(name) != here[name]]:
        each = ", ".join(f"{n} {head.get(n)} there, {here[n]} here" for n in differs)
        raise InputError("path", f"{path} does not fit this process: {each}; save it here again")
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise InputError("path", f"{path} is damaged; save it again")
    if lacking := kernels and compiled_kernels.unfit(head["kernels"]):
        log.warning("C++ kernels of %s are compiled again: here is no %s", path, lacking)
    else:
        compiled_kernels.give(kernels, head["kernels"])


def _read(file: Path) -> tuple[dict[str, Any], bytes, dict[str, bytes]]:
    """The head of a file, torch's artifacts and the compiled kernels by key."""
    try:
        with zipfile.ZipFile(file) as archive:
            head = json.loads(archive.read(_HEAD))
            if head.pop("format") != _FORMAT:
                raise KeyError(_FORMAT)
            names = [name for name in archive.namelist() if name.startswith(_KERNELS)]
            kernels = {name.removeprefix(_KERNELS): archive.read(name) for name in names}
            return head, archive.read(_ARTIFACTS), kernels
    except OSError as error:
        raise InputError("path", f"no cache can be read from {file}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        said = f"{file} was not written by dartfx.save_cache, or is damaged"
        raise InputError("path", said) from error


def _required() -> dict[str, str]:
    """All that must be equal where a cache is made and where it is used."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "dartfx's source": source_digest()[:16],
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version("triton"),
        # With what its C extensions must be built for: whether there is a global lock, for one.
        "python": f"{platform.python_version()} {sysconfig.get_config_var('SOABI')}",
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": gpu,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
