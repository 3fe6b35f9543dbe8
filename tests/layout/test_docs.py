"""Every Python block of the README and of docs/ runs, on a tiny model."""

from __future__ import annotations

import json
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import dartfx
from dartfx.backend.lowering import lowering_with
from dartfx.selection import registry
from dartfx.tools.evaluate.questions import Question
from dartfx.tools.evaluate.questions import load as load_questions
from dartfx.tools.evaluate.results import _from_bits
from dartfx.tools.evaluate.scores import MEAN, Sample
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import Decoder, Sizes, prompt, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The guides' contents are tested elsewhere: `make test` only runs what a reader tries first.
FIRST = ("README.md", "index.md")
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.name}-{number}",
        marks=[] if page.name in FIRST else [pytest.mark.slow],
    )
    for page in PAGES
    for number, block in enumerate(PYTHON.findall(page.read_text()))
]


@pytest.fixture(scope="module")
def llava() -> Family:
    family = load("llava", layers=3)
    with torch.no_grad():  # transformers installs hooks in the first call, which fullgraph forbids
        family.model(**family.make_inputs())
    return family


@pytest.fixture
def names(
    llava: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the pages take as given; without Inductor, which is not what they are about."""
    monkeypatch.chdir(tmp_path)
    registered = dict(registry._ENTRIES)
    llava.model.generation_config.max_new_tokens = 1
    llava.model.generation_config.cache_implementation = None  # decode="static" sets it
    inputs = llava.make_inputs()
    mask = inputs["input_ids"] == llava.image_token_id
    embeds = torch.randn(*mask.shape, 64)
    with torch.no_grad(), lowering_with(lambda config, module, inputs: module.forward):
        yield {
            "model": llava.model,
            "inputs": inputs,
            "image": Image.new("RGB", (40, 40), "grey"),
            "mask": mask,
            "embeds": embeds,
        }
    registry._ENTRIES.clear()
    registry._ENTRIES.update(registered)
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


def test_pictures_are_there_and_small() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]+\]\(([\w/.]+)\)", page.read_text()):
            assert (page.parent / target).stat().st_size < 100_000 or target == "quality.svg"
    shown = {name for p in PAGES for name in re.findall(r"\(pictures/([\w.]+)\)", p.read_text())}
    assert shown == {p.name for p in (ROOT / "docs" / "pictures").iterdir()}


def test_pictures_are_drawn_from_a_dump(tmp_path: Path) -> None:
    z = Sizes(seq=24, vision=12, layers=3)
    run(Decoder(z), prompt(z), retain_tokens=5, dump=tmp_path)
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    folder = tmp_path / "graph_000"
    drawn = ElementTree.fromstring(pictures["lengths"](folder))
    bars = [e for e in drawn.iter() if e.get("data-length")]
    assert [e.get("data-length") for e in bars if "layers" in str(e.get("data-part"))] == [
        "24", "24", "17",
    ]  # fmt: skip
    flow = ElementTree.fromstring(pictures["passes"](folder))
    texts = [e.text for e in flow.iter() if str(e.tag).endswith("text")]
    titles = [title for title, _ in pictures["STAGES"].values()]
    assert [t for t in texts if t in titles] == titles
    counts = [int(m[1]) for t in texts if (m := re.fullmatch(r"(\d+) calls", str(t)))]
    nodes = (folder / "01_normalise.txt").read_text().count(" = torch.ops.")
    assert counts[1] == nodes
    assert counts[-1] > counts[1]


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: dartfx\.([\w.]+)$", page, re.MULTILINE)
    objects = [pkgutil.resolve_name(f"dartfx.{name}") for name in listed]
    inside = [name for o in objects if isinstance(o, ModuleType) for name in o.__all__]
    assert not set(dartfx.__all__) - {*listed, *inside}
    assert len(set(listed)) == len(listed)
    assert all(o.__doc__ for o in objects)


def mean_accuracy(entry: dict[str, Any], few: list[Question], many: list[Question]) -> list[float]:
    """Of all tokens, then of each selector and budget, on the questions of ``few``, in percent."""
    bits = {
        (each["selector"], each["retained"]): each["right_by_seed"]["0"]
        for each in entry["settings"]
        if each["layer"] == 2
    }
    here = torch.tensor([question in few for question in many])
    columns = [(name, kept) for name in ("dart", "spread", "uniform") for kept in (192, 128, 64)]
    found = [_from_bits(bits[key], len(many))[here] for key in [*columns, ("dart", 0)]]
    return [round(100 * Sample(few).figures(right)[MEAN].value, 1) for right in found]


def test_the_hybrid_is_compared_as_measured() -> None:
    """With the attention-only model on the same pictures, from the verdict of each question."""
    page = (ROOT / "docs" / "quality.md").read_text()
    everything = ROOT / "examples" / "tiny_vlm" / "heldout" / "questions.jsonl"
    few, many = load_questions(everything, 32), load_questions(everything)
    for name, file, questions in (
        ("attention alone", "quality.json", many),
        ("hybrid", "quality_hybrid.json", few),
    ):
        entry = json.loads((ROOT / "docs" / file).read_text())
        row = re.search(rf"^\| {name} \|(.+)\|$", page, re.MULTILINE)
        assert row
        assert list(map(float, row[1].split("|")))[1:] == mean_accuracy(entry, few, questions)


PAIR = {"quality.json": (192, 128, 64), "quality_fine.json": (361, 225, 121)}


def percents(file: str, budgets: tuple[int, ...], name: str) -> list[str]:
    """Accuracy of a row of the table in its columns; "-" where it was not measured."""
    entry = json.loads((ROOT / "docs" / file).read_text())
    here = [each for each in entry["settings"] if each["layer"] == 2]
    found = {(each["selector"], each["retained"]): each for each in here}
    rows: dict[str, dict[str, Any]] = {
        "commonest answer": {kind: [value] for kind, value in entry["chance"].items()},
        "unpruned": entry["unpruned"],
        "none left": found["dart", 0]["accuracy"],
    }
    cells = []
    for kind in ("location", "count", "read", "mean"):
        for budget in budgets:
            figures = rows.get(name) or found.get((name, budget), {}).get("accuracy")
            cells.append(f"{100 * figures[kind][0]:.0f}" if figures else "-")
    return cells


def test_the_table_of_selectors_is_as_measured() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    rows = re.findall(r"^\| `?([\w +]+?)`? \|((?: [\d-]+ / [\d-]+ \|){12})$", page, re.MULTILINE)
    assert len(rows) == 15
    for name, cells in rows:
        both = zip(*(percents(file, kept, name) for file, kept in PAIR.items()), strict=True)
        assert cells.split("|")[:-1] == [f" {a} / {b} " for a, b in both], name
