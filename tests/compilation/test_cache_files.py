"""Mismatched files of compiled code are refused by name; test_warm_start.py loads one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

import dartfx
from dartfx.backend.warm_start import cache_files


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file as save_cache writes it, of no real code."""
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"one\ntwo", None))
    dartfx.save_cache(tmp_path / "cache")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    return tmp_path / "cache"


def test_the_same_bytes_reach_torch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    monkeypatch.setattr(
        torch.compiler, "load_cache_artifacts", lambda data: given.append(data) or object()
    )
    dartfx.load_cache(saved)
    assert given == [b"one\ntwo"]


@pytest.mark.parametrize("name", cache_files._required())
def test_what_differs_is_named(name: str, saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    parts["head.json"] = json.dumps({**json.loads(parts["head.json"]), name: "0.0"}).encode()
    with zipfile.ZipFile(saved, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(dartfx.DartfxError, match=f"does not fit this process: {name} 0.0 there, "):
        dartfx.load_cache(saved)


def test_files_that_are_no_cache(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(dartfx.DartfxError, match="no cache can be read from"):
        dartfx.load_cache(tmp_path / "missing")
    whole = saved.read_bytes()
    altered = whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]
    for other in (b"\x80\x04abc", whole[:-9], altered):
        saved.write_bytes(other)
        with pytest.raises(dartfx.DartfxError, match=r"was not written by dartfx\.save_cache"):
            dartfx.load_cache(saved)


def test_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(dartfx.DartfxError, match="call the compiled model first"):
        dartfx.save_cache(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
