"""The advice given when nothing was pruned."""

from __future__ import annotations

import pytest

import dartfx
from dartfx.backend.rewrite import refuse
from dartfx.model.explain import Explanation
from dartfx.observe.next_step import next_step
from dartfx.observe.report import Report
from dartfx.passes.outcome import Outcome, Unchanged
from dartfx.passes.refusal import Declined

CASES: list[tuple[Outcome | None, str]] = [
    (None, "let dynamo trace the model"),
    (Unchanged("no vision tokens enter this graph"), "call the model with an image"),
    (Unchanged("nothing to drop", all_retained=True), "a smaller retain_tokens"),
    (Unchanged("a prompt came with floats", unsure=True), "dartfx.vision_tokens(mask)"),
    (Declined("sorted", advice="kv_layout='uniform'"), "kv_layout='uniform'"),
    (Declined("sorted"), "read dumps/index.html"),
]


@pytest.mark.parametrize(("outcome", "hint"), CASES)
def test_explain_ends_with_what_to_do(outcome: Outcome | None, hint: str) -> None:
    reports = [] if outcome is None else [Report(0, 9, outcome)]
    last = str(Explanation(tuple(reports))).splitlines()[-1]
    assert last == next_step(reports)
    assert last.startswith("to prune this call: ")
    assert hint in last


def test_the_warning_says_the_same() -> None:
    declined = Declined("sorted", "model.py:3", "kv_layout='uniform'")
    with pytest.warns(dartfx.PruningWarning) as warned:
        refuse(dartfx.DartConfig(), declined)
    assert str(warned[0].message) == (
        "dartfx left a graph unpruned: sorted; at model.py:3; to prune this call: "
        "kv_layout='uniform'"
    )
