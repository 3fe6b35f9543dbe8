"""Equal layers compiled once by Inductor: equal outputs, and when it does not apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from tests.support.plain.decoders import Decoder, Inputs, Sizes, prompt

SIZES = Sizes(layers=4)
OPTIONS: dict[str, Any] = {
    "layer": 2,
    "retain_tokens": 4,
    "selector": "uniform",  # of fewest kernels
    "on_unsupported": "error",
}


def run(inputs: Inputs, **options: Any) -> tuple[list[torch.Tensor], dartfx.Report]:
    """All outputs, and the report of the graph that was pruned."""
    torch.manual_seed(0)
    model = dartfx.compile(Decoder(SIZES).eval(), **{**OPTIONS, **options})
    output = model(**inputs)
    (report,) = (r for r in dartfx.reports() if r.pruned)
    return [o for o in torch.utils._pytree.tree_leaves(output) if o is not None], report


def test_outlined_layers_compute_the_same(tmp_path: Path) -> None:
    inputs = prompt(SIZES)
    with torch.no_grad():
        given, report = run(inputs, dump=tmp_path)
        dartfx.reset()
        wanted, _ = run(inputs, lowering="eager")
    assert [calls for calls, _ in report.compilation.outlined] == [2, 2]
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other)
    written = json.loads((tmp_path / "graph_000" / "report.json").read_text())["compile"]
    assert written["outlined"] == [list(pair) for pair in report.compilation.outlined]
    assert {"AOTAutograd", "lowering", "kernels"} <= set(written["seconds"])
    assert written["kernels"] > 0 or written["cached"]
    assert 'id="compile"' in (tmp_path / "graph_000" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"outline_layers": False}, "outline_layers is off"),
        ({"inductor": {"freezing": True}}, "Inductor's option freezing is on"),
        ({"mode": "reduce-overhead"}, "Inductor's option triton.cudagraphs is on"),
    ],
)
def test_layers_stay_where_an_option_says_so(options: dict[str, Any], because: str) -> None:
    with torch.no_grad():
        _, report = run(prompt(SIZES), **options)
    assert (report.compilation.outlined, report.compilation.flat) == ([], because)


@pytest.mark.slow
def test_layers_stay_where_gradients_are_recorded() -> None:
    given, report = run(prompt(SIZES))
    assert report.compilation.flat == "the call records gradients"
    given[0].sum().backward()


@pytest.mark.slow
def test_layers_stay_where_sizes_are_symbolic() -> None:
    inputs = prompt(SIZES)
    torch.manual_seed(0)
    wanted, _ = run(inputs, lowering="eager")
    dartfx.reset()
    torch.manual_seed(0)
    model = dartfx.compile(Decoder(SIZES).eval(), dynamic=True, **OPTIONS)
    with torch.no_grad():
        given = model(**inputs)[0]
    (report,) = (r for r in dartfx.reports() if r.pruned)
    assert report.compilation.flat == "sizes are symbolic"
    torch.testing.assert_close(given, wanted[0])
