"""``report.html`` agrees with the dump and the report, and a browser renders it."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from dartfx.observe.html.kernels import kernels
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import Decoder, Layer, Sizes, Style, changed, prompt, run
from tests.support.processes.browser import dom, needs_browser

LAYERS, CUT, LENGTH, KEPT = 4, 2, 24, 17


class Shown:
    """A page, taken apart as a reader of its text would."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "report.html"
        self.html = self.path.read_text()

    @property
    def graph(self) -> dict[str, Any]:
        (text,) = re.findall(
            r'<script type="application/json" id="graph">(.*?)</script>', self.html
        )
        read: dict[str, Any] = json.loads(text)
        return read

    def table(self, name: str) -> list[list[str]]:
        (text,) = re.findall(
            rf'<table id="{name}"[^>]*>.*?<tbody>(.*?)</tbody>', self.html, re.DOTALL
        )
        text = re.sub(r'(<td[^>]*data-exact="(\d+)"[^>]*>)[^<]*', r"\1\2", text)  # without units
        rows = [re.split(r"<td[^>]*>", row)[1:] for row in text.split("</tr>")[:-1]]
        return [[unescape(re.sub("<[^>]+>", "", cell)).strip() for cell in row] for row in rows]


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    """A pruned decoder's dump, and what the report says of it."""
    torch._dynamo.reset()
    dartfx.reset()
    z, directory = Sizes(seq=LENGTH, vision=12, layers=LAYERS), tmp_path_factory.mktemp("dump")
    model = Decoder(z, Style(rope="one_row"))
    _, outcome = run(model, prompt(z), retain_tokens=5, dump=directory)
    assert isinstance(outcome, Pruned)
    (folder,) = directory.glob("graph_*")
    return folder, outcome


@pytest.fixture
def page(dumped: tuple[Path, Pruned]) -> Shown:
    return Shown(dumped[0])


def test_the_drop_is_drawn_where_the_cut_is(page: Shown) -> None:
    bars = re.findall(r'class="bar" data-part="(.*?)" data-length="(\d+)"', page.html)
    drawn = {unescape(part).removeprefix("L['self']."): int(length) for part, length in bars}
    layers = {f"layers.{i}": LENGTH if i < CUT else KEPT for i in range(LAYERS)}
    assert {k: v for k, v in drawn.items() if k in layers} == layers
    assert list(drawn)[-2:] == ["norm", "head"]
    assert drawn["norm"] == drawn["head"] == KEPT
    (cut,) = re.findall(r'class="cut" x1="([\d.]+)"', page.html)
    (first,) = re.findall(
        rf'data-part="[^"]*layers.{CUT}".*?<rect x="([\d.]+)"', page.html, re.DOTALL
    )
    assert float(cut) == pytest.approx(float(first) - 1)


def test_costs_add_up_to_the_report(page: Shown, dumped: tuple[Path, Pruned]) -> None:
    outcome = dumped[1]
    *rows, total = page.table("parts")
    layers = [list(map(number, row[1:])) for row in rows if re.search(r"layers\.\d+$", row[0])]
    assert len(layers) == LAYERS
    assert tuple(sum(row[i] for row in layers) for i in (2, 3)) == outcome.flops
    assert tuple(sum(row[i] for row in layers) for i in (6, 7)) == outcome.kv_bytes
    assert tuple(map(number, total[-2:])) == outcome.kv_bytes
    assert [row[:2] for row in layers] == [[LENGTH, LENGTH]] * CUT + [[LENGTH, KEPT]] * CUT
    assert all(row[5] < row[4] for row in layers[CUT:]), "values after the cut are smaller"


def test_the_cut_lists_what_crosses_it(page: Shown, dumped: tuple[Path, Pruned]) -> None:
    rows = page.table("crossings")
    assert [row[0] for row in rows] == [c.name for c in dumped[1].crossings]
    assert [row[-1] for row in rows] == [c.where for c in dumped[1].crossings]
    hidden, cos = rows[0], next(row for row in rows if row[0] == "cos")
    assert hidden[3:5] == ["layers.1", "layers.2"]
    assert cos[4] == "layers.2 .. layers.3 (2 parts)"


def test_before_and_after_are_the_dumps(page: Shown, dumped: tuple[Path, Pruned]) -> None:
    """Read off the dump's text by a regular expression of this test's own."""

    def code(stage: str) -> dict[str, str]:
        text = (dumped[0] / f"{stage}.txt").read_text()
        found = re.findall(r'^ +((\w+): "[^"]+" = torch\.ops\.[^;\n]+)', text, re.MULTILINE)
        return {name: line.replace("torch.ops.", "") for line, name in found}

    before, after = code("01_normalise"), code("08_check")
    values = {v[0]: (v[2], v[3]) for v in page.graph["values"]}
    assert len(after) > len(before) > 100
    for name in before | after:
        assert values[name] == (before.get(name), after.get(name))
    new = [name for name in after if name not in before]
    assert any("select_tokens" in after[name] for name in new)


def test_lineage_ends_where_the_vision_tokens_enter(page: Shown) -> None:
    graph = page.graph
    names = [v[0] for v in graph["values"]]
    links = {int(i): {dim: rest for dim, *rest in found} for i, found in graph["links"].items()}

    def origin(index: int, dim: int) -> str:
        for _ in range(1000):
            parent, at, _user = links[index][dim]
            if parent < 0:
                return names[index]
            index, dim = parent, at
        raise AssertionError("a lineage that never ends")

    assert len(links) > 60
    assert {origin(i, dim) for i, dims in links.items() for dim in dims} == {"masked_scatter"}
    # The rotary table has its axis from meeting the queries; weights and features have none.
    assert {"cos", "sin", "arange"} <= {names[i] for i in links}
    weights = [i for i, v in enumerate(graph["values"]) if v[0].startswith("arg")]
    assert [names[i] for i in weights if i in links] == ["arg0_1"], "the token ids"


def test_it_needs_nothing_but_itself(page: Shown) -> None:
    assert not re.search(r"https?://|@import|<script src|<link(?![^>]*data:)", page.html)
    for name in re.findall(r'<a href="([^"#]+)"', page.html):
        assert (page.path.parent / name).is_file()
    assert '<a href="repro.py">' in page.html


def test_a_refusal_says_why_and_shows_the_graph_as_it_was(tmp_path: Path) -> None:
    layer = changed(lambda m, x: x.cumsum(1))
    _, outcome = run(Decoder(layer=layer), prompt(Sizes()), retain_tokens=5, dump=tmp_path)
    assert isinstance(outcome, Declined)
    page = Shown(tmp_path / "graph_000")
    text = unescape(page.html)
    assert f"NOT pruned: {outcome.because}" in text
    assert f"where: {outcome.where}" in text
    graph = page.graph
    assert not graph["compared"]
    stopped = next(v for v in graph["values"] if "cumsum" in v[2])
    assert str(stopped[5][0]) in graph["links"], "whose token axis reached the operator"
    assert 'class="cut"' not in page.html


def test_a_graph_without_vision_tokens(tmp_path: Path) -> None:
    run(torch.nn.ReLU(), {"input": torch.ones(2)}, dump=tmp_path)
    html = (tmp_path / "graph_000" / "report.html").read_text()
    assert "no vision tokens enter this graph" in html
    assert "<svg" not in html


def shown_by_browser(page: Path, at: str) -> str:
    """The page's elements after its script ran.  at: the value to show, or ?what to search for."""
    return dom(f"{page.as_uri()}#{at}")


@needs_browser
def test_a_browser_shows_a_value_and_its_lineage(page: Shown) -> None:
    shown = shown_by_browser(page.path, "view_9")
    (before,) = re.findall(r'<pre id="before">(.*?)</pre>', shown)
    (after,) = re.findall(r'<pre id="after">(.*?)</pre>', shown)
    assert f"f32[1, {LENGTH}, " in before
    assert f"f32[1, {KEPT}, " in after
    (lineage,) = re.findall(r'<ul id="lineage">(.*?)</ul>', shown)
    assert re.search(r'dim 1 ← dim 1 of <a href="#\w+">\w+</a> \(\w+\).*masked_scatter', lineage)


def test_what_each_pass_changed(page: Shown, dumped: tuple[Path, Pruned]) -> None:
    """Counted again, in the text files."""

    def code(file: str) -> dict[str, str]:
        text = (dumped[0] / file).read_text()
        found = re.findall(r"^ +((\w+)(?:: \"[^\"]+\")? = [^;\n]+\()", text, re.MULTILINE)
        whole = re.findall(r"^ +((\w+)(?:: \"[^\"]+\")? = (?!\w+$)[^;\n]+)", text, re.MULTILINE)
        assert len(found) <= len(whole)
        return {name: line for line, name in whole}

    files = sorted(f.name for f in dumped[0].glob("0[1-9]_*.txt"))
    rows = page.table("changes")
    assert [row[0].replace(" ", "_") for row in rows] == [f[3:-4] for f in files[1:]]
    for row, file, other in zip(rows, files, files[1:], strict=False):
        before, after = code(file), code(other)
        changed = sum(before[n] != after[n] for n in before.keys() & after.keys())
        if before == after:
            assert row[-1] == "nothing changed"
        else:
            counts = [len(after.keys() - before.keys()), len(before.keys() - after.keys()), changed]
            assert [number(text) for text in row[3:6]] == counts
    assert "index_select.default +" in next(row for row in rows if row[0] == "gather")[-1]
    assert rows[0][-1] == rows[1][-1] == "nothing changed"  # locate, axes


def test_equal_layers_are_folded(page: Shown) -> None:
    (tree,) = re.findall(r'<ul class="tree" id="modules">(.*?)<h2>', page.html, re.DOTALL)
    folded = re.findall(r"<code>(\d+) … (\d+)</code>\s*<span class=\"badge\">(\d) equal", tree)
    # Layer 1 also computes the keys' norms that the selection reads.
    assert folded[-1] == (str(CUT), str(LAYERS - 1), "2")


@needs_browser
@pytest.mark.parametrize("width", [400, 1000, 2000])
def test_it_fits_into_the_window(page: Shown, tmp_path: Path, width: int) -> None:
    """Only tables and pictures that scroll by themselves are wider."""
    probe = tmp_path / "report.html"
    script = "const e = document.documentElement; document.title = e.scrollWidth - e.clientWidth"
    probe.write_text(page.html.replace("</body>", f"<script>{script}</script></body>"))
    shown = dom(probe.as_uri(), f"--window-size={width},900")
    assert re.findall(r"<title>(-?\d+)</title>", shown) == ["0"]


@needs_browser
def test_keys_search_and_go_through_the_values(page: Shown, tmp_path: Path) -> None:
    script = """
      const press = (key, target = document.body) =>
        target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      press("/");
      const focused = document.activeElement.id;
      search.value = "select_tokens"; search.dispatchEvent(new Event("input"));
      press("ArrowDown", search);
      setTimeout(() => { document.title = focused + location.hash; }, 100);
    """
    probe = tmp_path / "report.html"
    probe.write_text(page.html.replace("</body>", f"<script>{script}</script></body>"))
    shown = dom(probe.as_uri(), "--virtual-time-budget=2000")
    assert "<title>search#select_tokens_default</title>" in shown
    assert '<pre id="before">(new)</pre>' in shown


KERNELS = """
        # Topologically Sorted Source Nodes: [linear_2, view], Original ATen: [aten.mm, aten.view]
        extern_kernels.mm(buf7, arg7_1, out=buf17)
        # Topologically Sorted Source Nodes: [mul], Original ATen: [aten.mul]
        stream0 = get_raw_stream(0)
        triton_poi_fused_mul_3.run(buf17, buf3, 12, stream=stream0)
        cpp_fused_add_0(buf3)
"""


def test_kernels_are_read_off_inductors_code(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(KERNELS)
    found = kernels([str(tmp_path / "code.py"), str(tmp_path / "gone.py")])
    product = ["extern_kernels.mm"]
    assert found == {"linear_2": product, "view": product, "mul": ["triton_poi_fused_mul_3"]}


class Chatty(Layer):
    """A layer of as many operators as a large model's."""

    def positional(self, x: torch.Tensor, context: Any) -> torch.Tensor:
        for _ in range(50):
            x = x * 1.01 + 0.001
        return super().positional(x, context)


@pytest.mark.slow
@needs_browser
def test_a_graph_of_32_layers_shows_only_what_is_searched_for(tmp_path: Path) -> None:
    """Rows of all its values at once would make a browser stand still."""
    z = Sizes(layers=32)
    model = Decoder(z, Style(rope="one_row"), Chatty)
    _, outcome = run(model, prompt(z), retain_tokens=5, dump=tmp_path)
    assert isinstance(outcome, Pruned)
    page = Shown(tmp_path / "graph_000")
    assert len(page.graph["values"]) > 4000
    assert page.path.stat().st_size < 2_000_000
    shown = shown_by_browser(page.path, "?layers.31")
    assert re.search(r'data-ready="\d+"', shown), "the script ran to its end"
    (found,) = re.findall(r'<span id="found">(\d+) values', shown)
    rows = shown.count("<tr data-i=")
    assert 100 < int(found) < 4000 / 32 + 50
    assert rows == int(found)
