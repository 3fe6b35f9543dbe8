"""The history of calls is per model and bounded."""

from __future__ import annotations

import gc

import pytest
import torch

import dartfx
from dartfx.cli.tiny_model import Tiny, prompt
from dartfx.config.options import DartConfig
from dartfx.model.compiled_model import CompiledModel
from dartfx.observe import report
from dartfx.observe.report import MOST_REPORTS
from dartfx.passes.outcome import Pruned, Unchanged
from dartfx.runtime import vision_mask
from dartfx.runtime.keep_idx import KeepIdxRecorder

pytestmark = pytest.mark.usefixtures("own_objects")

EAGER = {"lowering": "eager", "tokens": True}


def test_reports_of_a_server_are_bounded() -> None:
    dartfx.reset()
    for _ in range(10_000):
        report.record(1, Unchanged("no vision tokens"))
    graphs = [made.graph for made in dartfx.reports()]
    assert graphs == list(range(9_000, 10_000))
    before = report.latest()  # a tally must go on once the list is full
    made = report.record(1, Unchanged("one more"))
    assert report.since(before) == [made]


def test_a_model_knows_its_own_reports_and_kept_tokens() -> None:
    models = [dartfx.compile(Tiny(), layer=1, retain_tokens=r, **EAGER) for r in (4, 6)]
    for model in models:
        model(*prompt("cpu"))
    for model, retained in zip(models, (4, 6), strict=True):
        (made,) = dartfx.reports(model)
        assert isinstance(made.outcome, Pruned)
        assert made.outcome.retained == retained
        assert len(dartfx.kept_tokens(model=model)[0].kept) == retained
    assert len(dartfx.reports()) == 2
    assert len(dartfx.kept_tokens()[0].kept) == 6
    with pytest.raises(TypeError, match=r"Tiny was not compiled by dartfx\.compile"):
        dartfx.reports(Tiny())


def test_nothing_grows_with_the_calls_of_a_server() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        report.record(1, Unchanged("no vision tokens"))
        embeds, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
        vision_mask.record(embeds, mask, 2)
        assert vision_mask.find(embeds) is not None
        return KeepIdxRecorder(lambda: (x, mask, mask), added=("keep_idx", "vision_mask"))()[0]

    model = CompiledModel(
        torch.nn.Identity(), call, call, DartConfig(tokens=True, on_unsupported="ignore")
    )
    model(torch.ones(1, dtype=torch.int64))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):  # until both deques are full
        model(torch.ones(1, dtype=torch.int64))
    full = len(gc.get_objects())
    for _ in range(3000):
        model(torch.ones(1, dtype=torch.int64))
    gc.collect()
    assert len(model.history.reports) == len(dartfx.reports()) == MOST_REPORTS
    assert len(gc.get_objects()) - full < (full - before) / 10
