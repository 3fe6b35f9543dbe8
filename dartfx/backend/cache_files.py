"""torch's compiled code in a file, from which other processes start warm."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from dartfx.config.fingerprint import source_digest
from dartfx.errors import DartfxError, InputError

__all__ = ["load_cache", "save_cache"]

_FORMAT = "dartfx compile cache 1"


def save_cache(path: str | os.PathLike[str]) -> None:
    """Write all that ``torch.compile`` compiled in this process so far to a file.

    For images of containers: call the model once for every kind of prompt, save, and call
    :func:`load_cache` in the container before the first call.  The file holds code that runs, and
    serves processes with the same options, versions and processor only.  torch's artifacts hold no
    compiled C++ files: on a CPU keep the folder of ``TORCHINDUCTOR_CACHE_DIR``, too, or these are
    compiled again.  Raises DartfxError where nothing was compiled, or only by a lowering that has
    no cache.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise DartfxError(
            'there is nothing to save: call the compiled model first, with lowering="inductor"'
        )
    file = Path(path)
    # Complete or not there: another process may read it at once.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    head = json.dumps({"format": _FORMAT, **_required()})
    unfinished.write_bytes(head.encode() + b"\n" + saved[0])
    unfinished.replace(file)


def load_cache(path: str | os.PathLike[str]) -> None:
    """Load compiled code that :func:`save_cache` wrote; load trusted files only.

    Graphs that the file does not hold are compiled as usual.  Raises InputError for a file that is
    none of save_cache's, or that was made by other versions or for another processor, naming them.
    """
    try:
        head, _, artifacts = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise InputError("path", f"no cache can be read from {path}: {error}") from error
    try:
        made = json.loads(head)
    except ValueError:
        made = None
    if not isinstance(made, dict) or made.pop("format", None) != _FORMAT:
        raise InputError("path", f"{path} was not written by dartfx.save_cache")
    here = _required()
    if differs := [name for name in here if made.get(name) != here[name]]:
        each = ", ".join(f"{n} {made.get(n)} there, {here[n]} here" for n in differs)
        raise InputError("path", f"{path} does not fit this process: {each}; save it here again")
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise InputError("path", f"{path} is damaged; save it again")


def _required() -> dict[str, str]:
    """All that must be equal where a cache is made and where it is used."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "dartfx's source": source_digest()[:16],
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": gpu,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
