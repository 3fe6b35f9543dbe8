"""Prefills in CUDA graphs, on a GPU: answers, caches that outlive replays, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN

pytestmark = pytest.mark.gpu


@cache
def family() -> Family:
    return load("llava", layers=3)


def compiled(prefill: str | None) -> Any:
    model = copy.deepcopy(family().model).cuda()
    return dartfx.compile(model, retain_tokens=RETAIN, on_unsupported="error", prefill=prefill)


def prompt(after: int) -> dict[str, Tensor]:
    inputs = family().make_inputs("one", after=after)
    return {name: value.cuda() for name, value in inputs.items()}


def answer(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("prefill", ["graphs", "bucketed"])
def test_replays_answer_as_plain_calls(prefill: str) -> None:
    plain, recorded = compiled(None), compiled(prefill)
    lengths = [4, 4, 4, 5, 5, 4]
    wanted = {after: answer(plain, prompt(after)) for after in set(lengths)}
    found = [answer(recorded, prompt(after)) for after in lengths]
    assert recorded._compiled_call_impl.prefills.recordings.made
    for after, result in zip(lengths, found, strict=True):
        # Read at the end: every cache has outlived the replays after it.
        assert torch.equal(result.sequences, wanted[after].sequences)
        close = {"rtol": 2e-3, "atol": 2e-3}
        torch.testing.assert_close(
            torch.cat(result.logits), torch.cat(wanted[after].logits), **close
        )
        layers = result.past_key_values.layers, wanted[after].past_key_values.layers
        for mine, theirs in zip(*layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, **close)
            torch.testing.assert_close(mine.values, theirs.values, **close)


def test_other_threads_replay_too() -> None:
    model = compiled("graphs")
    wanted = [answer(model, prompt(4)).sequences for _ in range(3)][-1]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: answer(model, prompt(4)).sequences, range(6)))
    assert all(torch.equal(each, wanted) for each in found)
