"""A LLaVA of three layers, and its prefill of one prompt exported."""

from __future__ import annotations

import pytest
from torch.export import ExportedProgram

from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.exporting import prefill


@pytest.fixture(scope="module")
def llava() -> Family:
    return load("llava", layers=3)


@pytest.fixture(scope="module")
def program(llava: Family) -> ExportedProgram:
    return prefill(llava, llava.make_inputs())
