"""Fingerprints cover every option, source file and version that affects a result, and no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dartfx.config import fingerprint
from dartfx.config.options import DartConfig

CHANGES: list[dict[str, object]] = [
    {"retain_tokens": 64},
    {"reduction_ratio": 0.5},
    {"layer": 3},
    {"pivot_image_tokens": 5},
    {"pivot_text_tokens": 5},
    {"selector": "uniform"},
    {"kv_layout": "layered"},
    {"order_mixing": "refuse"},
    {"kernel": "torch"},
    {"lowering": "eager"},
    {"inductor": {"debug": True}},
    {"inductor": {"debug": False}},
    {"mode": "max-autotune"},
    {"tokens": True},
    {"check_ranks": True},
    {"quota": "image"},
    {"quota": "image", "min_tokens": 2},
    {"outline_layers": False},
    {"merge": "nearest"},
    {"calibrate": True},
]


def test_every_option_that_changes_results_changes_the_fingerprint() -> None:
    configs = [DartConfig(), *(DartConfig(**change) for change in CHANGES)]  # type: ignore[arg-type]
    assert len({config.fingerprint() for config in configs}) == len(configs)
    covered = {name for change in CHANGES for name in change}
    assert covered | {"dump", "dump_graphs", "dump_passes", "on_unsupported"} == set(
        DartConfig.__dataclass_fields__
    )


def test_reporting_options_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    reporting = DartConfig(
        dump=tmp_path, dump_graphs="pruned", dump_passes="check", on_unsupported="error"
    )
    assert reporting.fingerprint() == DartConfig().fingerprint()


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from dartfx.config import DartConfig\n"
        "print(DartConfig(inductor={'debug': True, 'max_autotune': True}).fingerprint())"
    )
    root = Path(__file__).parents[2]
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert re.fullmatch("[0-9a-f]{32}", elsewhere)
    here = DartConfig(inductor={"max_autotune": True, "debug": True})
    assert here.fingerprint() == elsewhere


def test_source_digest_sees_what_can_change_a_result_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "dartfx"
    (package / "ops").mkdir(parents=True)
    (tmp_path / "passes").mkdir()
    (package / "passes").symlink_to("../passes")
    files = [package / "a.py", package / "ops" / "b.py", tmp_path / "passes" / "c.py"]
    for file in files:
        file.write_text("x = 1\n")
    monkeypatch.setattr(fingerprint, "__file__", str(package / "config" / "fingerprint.py"))
    read = fingerprint.source_digest.__wrapped__
    digests = [read()]
    assert read() == digests[0]
    for file in files:
        file.write_text("x = 2\n")
        digests.append(read())
    (package / "notes.txt").write_text("not source")
    for (folder,) in fingerprint._CHANGE_NO_RESULT:
        (package / folder).mkdir()
        (package / folder / "d.py").write_text("x = 1\n")
    assert read() == digests[-1]
    assert len(set(digests)) == 4


def test_every_folder_either_changes_results_or_does_not() -> None:
    root = Path(fingerprint.__file__).parents[1]
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    left_out = {folder for (folder,) in fingerprint._CHANGE_NO_RESULT}
    computes = {"backend", "config", "export", "model", "ops", "passes", "runtime", "selection"}
    assert folders == left_out | computes


class Rewrite:
    def __init__(self, version: object) -> None:
        self.version = version

    def uuid(self) -> object:
        return self.version


def test_objects_are_identified_by_uuid_or_not_at_all() -> None:
    assert fingerprint.canonical(Rewrite("1")) == fingerprint.canonical(Rewrite("1"))
    assert fingerprint.canonical(Rewrite("1")) != fingerprint.canonical(Rewrite("2"))
    for opaque in (Rewrite(None), Rewrite, object(), print):
        assert fingerprint.canonical(opaque) != fingerprint.canonical(opaque)


def test_an_opaque_inductor_option_keeps_one_fingerprint_per_config() -> None:
    config = DartConfig(inductor={"post_grad_custom_post_pass": print})
    again = DartConfig(inductor={"post_grad_custom_post_pass": print})
    assert config.fingerprint() == config.fingerprint()
    assert config.fingerprint() != again.fingerprint()


def test_containers_and_scalars_of_other_types_differ() -> None:
    values: list[object] = [1, 1.0, True, "1", b"1", None, [1], [[1]], {"1": 1}, {1: 1}, {}, []]
    assert len({fingerprint.canonical(value) for value in values}) == len(values)
    assert fingerprint.canonical({"a": 1, "b": 2}) == fingerprint.canonical({"b": 2, "a": 1})
