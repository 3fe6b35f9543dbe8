"""The fingerprint of a result, as one digest: plain values, the source behind it, and versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["canonical", "digest", "source_digest"]


# Folders that use or observe compiled code; an edit there does not change it.
_CHANGE_NO_RESULT = {
    (folder,)
    for folder in ["cli", "integrations", "observe", "replay", "token_map", "tools", "verification"]
}


def digest(facts: Mapping[str, object]) -> str:
    """Hex digest of ``facts``, the source that computes results, and dartfx's and torch's versions.

    Equal in every process for equal plain facts; see :func:`canonical` for other objects.
    """
    everything = {
        "facts": facts,
        "source": source_digest(),
        "versions": [_own_version(), str(torch.__version__), torch.version.git_version],
    }
    return hashlib.sha256(canonical(everything).encode()).hexdigest()[:32]


def canonical(value: object) -> str:
    """Text that is equal exactly for equal values of plain data (None, numbers, text, containers).

    An object with a ``uuid()``, as Inductor's custom passes have, is identified by its result.  Any
    other object gets text that no other call returns: its behaviour is unknown, so it
    must not count as equal to anything seen before.
    """
    if isinstance(value, Mapping):
        items = sorted((canonical(k), canonical(v)) for k, v in value.items())
        return "{" + ",".join(f"{k}:{v}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    identify = None if isinstance(value, type) else getattr(value, "uuid", None)
    # By a uuid() of None, a custom pass disables Inductor's cache.
    if callable(identify) and (identity := identify()) is not None:
        return f"{type(value).__module__}.{type(value).__qualname__}:{canonical(identity)}"
    return uuid.uuid4().hex


@functools.cache
def source_digest() -> str:
    """Hex digest of every Python file that can change a result; read once per process."""
    root = Path(__file__).parents[1]
    paths = (
        Path(folder, name)
        # In a checkout dartfx/passes is a symlink.
        for folder, _, names in os.walk(root, followlinks=True)
        if Path(folder).relative_to(root).parts[:1] not in _CHANGE_NO_RESULT
        for name in names
        if name.endswith(".py")
    )
    running = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        running.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        running.update(content)
    return running.hexdigest()


def _own_version() -> str:
    try:
        return importlib.metadata.version("dartfx")
    except importlib.metadata.PackageNotFoundError:
        # Imported from a folder that was never installed; the source digest identifies it.
        return "not installed"
