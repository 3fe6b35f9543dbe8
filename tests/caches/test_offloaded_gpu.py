"""Caches offloaded to the host, on a GPU: transformers moves them in CUDA streams only."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import dartfx
from dartfx import compat
from dartfx.model.caches.kv_cache import pruned_length
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        compat.offloaded_caches_race(),
        reason="transformers before 5.20 reads offloaded layers while they are on their way",
    ),
]
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


@cache
def family() -> Family:
    return load("llava", layers=3)


@cache
def compiled() -> Any:
    model = copy.deepcopy(family().model).cuda()
    return dartfx.compile(model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error")


def prompt(variant: str, seed: int = 0) -> Inputs:
    inputs = family().make_inputs(variant, seed=seed)
    return {name: value.cuda() for name, value in inputs.items()}


def answer(inputs: Inputs, kind: str) -> Any:
    how = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": kind}
    said = {"return_dict_in_generate": True, "output_logits": True}
    return compiled().generate(**inputs, **how, **said)


@pytest.mark.parametrize("variant", ["one", "pad2", "ragged"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_they_answer_as_caches_on_the_device(kind: str, variant: str) -> None:
    right, ours = answer(prompt(variant), "dynamic"), answer(prompt(variant), kind)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(right.logits), **CLOSE)
    assert pruned_length(ours.past_key_values) == pruned_length(right.past_key_values) > 0
    assert {layer.keys.device.type for layer in ours.past_key_values.layers} == {"cpu", "cuda"}


def test_turns_on_an_offloaded_cache_and_one_that_was_moved() -> None:
    first, second = prompt("one"), prompt("one", seed=3)
    for inputs in (first, second):
        del inputs["attention_mask"]
    plain, offloaded = DynamicCache(), DynamicCache(offloading=True)
    said = torch.tensor([[5, 6, 7]], device="cuda")
    with torch.no_grad():
        for turn in (first, {"input_ids": said}, second, {"input_ids": said}):
            right = compiled()(**turn, past_key_values=plain).logits
            ours = compiled()(**turn, past_key_values=offloaded).logits
            torch.testing.assert_close(ours, right, **CLOSE)
        for layer in plain.layers:
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        moved = copy.deepcopy(plain)
        for layer in moved.layers:
            layer.keys, layer.values = layer.keys.cuda(), layer.values.cuda()
        right = compiled()(input_ids=said, past_key_values=offloaded).logits
        ours = compiled()(input_ids=said, past_key_values=moved).logits
        on_host = copy.deepcopy(family().model)
        hosts = on_host(input_ids=said.cpu(), past_key_values=plain).logits
    torch.testing.assert_close(ours, right, **CLOSE)
    torch.testing.assert_close(hosts, right.cpu(), **CLOSE)
