"""When dynamo's handling of texts is changed, and a torch without what that needs."""

from __future__ import annotations

import dis
import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from dartfx import compat
from dartfx.backend import dynamo_patch, graph_compiler

OPCODE = dis.opmap["BUILD_STRING"]

PROGRAM = """
import dis
from torch._dynamo.symbolic_convert import InstructionTranslator as translator
from torch._dynamo.backends.registry import lookup_backend
opcode = dis.opmap["BUILD_STRING"]
before = translator.dispatch_table[opcode]
import dartfx, dartfx.backend.graph_compiler
assert translator.dispatch_table[opcode] is before, "changed by an import"
lookup_backend("dart")
assert translator.dispatch_table[opcode] is not before, "not changed by the lookup"
"""


@pytest.fixture(autouse=True)
def not_installed() -> Iterator[None]:
    dynamo_patch.uninstall()
    yield
    dynamo_patch.uninstall()
    graph_compiler.prepare_dynamo()


def test_an_import_changes_nothing_and_the_lookup_does() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_installed_once_and_can_be_undone() -> None:
    before = InstructionTranslator.dispatch_table[OPCODE]
    assert dynamo_patch.install(lambda backend: False)
    changed = InstructionTranslator.dispatch_table[OPCODE]
    assert changed is not before
    assert dynamo_patch.install(lambda backend: False)
    assert InstructionTranslator.dispatch_table[OPCODE] is changed
    dynamo_patch.uninstall()
    assert InstructionTranslator.dispatch_table[OPCODE] is before


@pytest.mark.parametrize(
    "key",
    [
        "InstructionTranslatorBase",
        "LazySymNodeFormatString",
        "LazyVariableTracker",
        "StringFormatVariable",
    ],
)
def test_without_a_private_name_the_backend_works_and_one_line_names_it(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dartfx.backend import dart

    name = compat.NAMES[key]

    dynamo_patch.uninstall()
    before = InstructionTranslator.dispatch_table[OPCODE]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "dartfx"):
        patch.delattr(importlib.import_module(name.module), name.attribute)
        assert compat.missing() == [name]
        graph_compiler.prepare_dynamo()
        graph_compiler.prepare_dynamo()
    (line,) = [r.message for r in caplog.records if r.name == dynamo_patch.__name__]
    assert str(name) in line
    assert InstructionTranslator.dispatch_table[OPCODE] is before
    doubled = torch.compile(lambda x: x * 2, backend=dart, options={"lowering": "eager"})
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))
