"""The figures of ``bench generate``: arithmetic of its rows, and shapes of its models."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from dartfx.tools.bench.generate.figures import limits, row_figures, speed_ups, tables
from dartfx.tools.bench.timing import alternate
from dartfx.tools.zoo.shapes import SHAPES, build


def test_samples_are_of_the_clock_that_is_given() -> None:
    ticks = count(0.0, 2.0)
    made = alternate([lambda: None, lambda: next(ticks)], 2, clock=lambda: next(ticks))
    assert made == [[2.0, 2.0], [4.0, 4.0]]


def test_arithmetic_of_one_row() -> None:
    figures = row_figures({1: 0.5, 9: 0.9}, tower=0.1)
    assert figures["decode_tokens_per_second"] == pytest.approx(8 / 0.4)
    assert figures["shares"][9] == pytest.approx(
        {"vision_tower": 1 / 9, "prefill": 4 / 9, "decode": 4 / 9}
    )
    assert row_figures({1: 0.5, 9: 0.9}, 0.1, batch=4)["decode_tokens_per_second"] == pytest.approx(
        4 * 8 / 0.4
    )
    assert row_figures({1: 0.5, 9: 0.4}, None)["decode_tokens_per_second"] is None
    assert row_figures({1: 0.5}, None)["shares"] is None


def test_limits_are_amdahls() -> None:
    base = {1: 0.5, 9: 0.9}
    assert limits(base, 0.1, 0.25) == {
        "prefill": pytest.approx(4),
        "total": {1: pytest.approx(0.5 / 0.2), 9: pytest.approx(0.9 / 0.6)},
    }
    faster = speed_ups(base, {1: 0.3, 9: 0.6}, 0.1)
    assert faster["prefill"] == pytest.approx(2)
    assert faster["total"] == {1: pytest.approx(5 / 3), 9: pytest.approx(1.5)}


def test_a_tower_that_cannot_be_timed_apart_leaves_the_totals() -> None:
    row = {"name": "eager", "label": "eager", "failed": "", "kv_bytes": 2e6, "peak_bytes": 3e9}
    row["warmup_seconds"] = 7.0
    text = tables(
        {
            "settings": {"new_tokens": [1, 9]},
            "model": {"layer": 2},
            "vision_tower_seconds": None,
            "rows": [row | row_figures({1: 0.5, 9: 0.9}, None)],
            "speed_ups": {},
            "limits": {},
        }
    )
    assert "| eager | 500.0 | 20.0 | 900.0 | 2.0 | 3.00 | 2.00 | 7 |" in text
    assert "vision tower: not measured" in text


@pytest.mark.parametrize(
    ("name", "parameters", "vision"),
    [
        # Of the checkpoints on the hub.
        ("llava-1.5-7b", 7_063_427_072, 576),
        ("llava-next-7b", 7_063_431_168, 2928),
        ("llava-next-8", 7_063_431_168 - 24 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096), 2928),
        ("qwen2.5-vl-7b", 8_292_166_656, 4000),
    ],
)
def test_shapes_are_those_of_the_checkpoints(name: str, parameters: int, vision: int) -> None:
    assert SHAPES[name][1] < vision
    model = build(name, torch.device("meta"), torch.bfloat16).model
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert SHAPES[name][0]().tokens_per_image == vision
