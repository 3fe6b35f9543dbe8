"""Checks that a command can write its outputs before it starts work."""

from __future__ import annotations

import os
from pathlib import Path

from dartfx.errors import InputError

__all__ = ["check_file", "check_folder"]


def check_file(argument: str, path: str | Path | None) -> None:
    """Raise InputError if no file can be written at ``path``; None passes."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise InputError(argument, f"{str(path)!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise InputError(argument, f"there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(argument, f"no permission to write {str(path)!r}")


def check_folder(argument: str, path: str | Path | None) -> None:
    """Raise InputError if ``path`` cannot be a writable folder; None passes.

    The folder need not exist: the writer creates it.
    """
    if path is None:
        return
    existing = Path(path)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(argument, f"{str(existing)!r} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(argument, f"no permission to write into {str(existing)!r}")
