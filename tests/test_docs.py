"""Every Python block of the README and of docs/ runs, on a tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dartfx
import dartfx.dump
from dartfx import selectors
from dartfx.zoo.family import Family
from dartfx.zoo.registry import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(PYTHON.findall(page.read_text()))
]


@pytest.fixture(scope="module")
def llava() -> Family:
    family = load("llava")
    with torch.no_grad():  # transformers installs hooks in the first call, which fullgraph forbids
        family.model(**family.make_inputs())
    return family


@pytest.fixture
def names(
    llava: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the pages take as given; without Inductor, which is not what they are about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dartfx.dump, "lower", lambda config, module, inputs: module.forward)
    registered = dict(selectors._ENTRIES)
    llava.model.generation_config.max_new_tokens = 2
    llava.model.generation_config.cache_implementation = None  # decode="static" sets it
    inputs = llava.make_inputs()
    mask = inputs["input_ids"] == llava.image_token_id
    embeds = torch.randn(*mask.shape, 64)
    with torch.no_grad():
        yield {
            "model": llava.model,
            "inputs": inputs,
            "image": Image.new("RGB", (40, 40), "grey"),
            "mask": mask,
            "embeds": embeds,
        }
    selectors._ENTRIES.clear()
    selectors._ENTRIES.update(registered)
    llava.model._compiled_call_impl = None
    dartfx.reset()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, "<page>", "exec"), names)


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 10


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {p.name for p in PAGES[1:]} == set(listed)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([\w/.]+\.md)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"
