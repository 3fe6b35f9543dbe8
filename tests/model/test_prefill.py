"""Models whose prefills are recordings, also of padded prompts: what can be tested on a CPU."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dartfx
from dartfx.runtime.prefill.padding import is_plain_prefill
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.replaying import Again
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@cache
def family(name: str) -> Family:
    return load(name, layers=3)


def compiled(name: str, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    model = dartfx.compile(copy.deepcopy(family(name).model), **settings)
    if (prefills := model._compiled_call_impl.prefills) is not None:
        prefills.recordings.recorder = Again()
    return model


def answer(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


def assert_alike(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.cat(one.logits), torch.cat(other.logits), **CLOSE)
    for mine, theirs in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, **CLOSE)
        torch.testing.assert_close(mine.values, theirs.values, **CLOSE)
        assert mine.dropped == theirs.dropped
        assert torch.equal(mine.kept.keep_idx, theirs.kept.keep_idx)
        assert mine.keys.is_contiguous()


def made_by(model: Any) -> int:
    return int(model._compiled_call_impl.prefills.recordings.made)


@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl", "llava_next")])
def test_padded_and_recorded_prefills_answer_as_plain_ones(name: str) -> None:
    plain, padded = (compiled(name, prefill=prefill) for prefill in (None, "bucketed"))
    for after in (4, 5):
        inputs = family(name).make_inputs("one", after=after)
        assert_alike(answer(plain, inputs), answer(padded, inputs))
    assert made_by(padded) == 1, "one length for both, and one graph in spite of its check"
    inputs["input_ids"][:, -5:-4] = family(name).model.config.image_token_id
    with pytest.raises(RuntimeError, match=r"u\d+ >= 1"):  # a placeholder without a feature
        answer(padded, inputs)


@pytest.mark.slow
def test_prefills_recorded_at_their_length_answer_as_plain_ones() -> None:
    plain, graphs = (compiled("llava", prefill=prefill) for prefill in (None, "graphs"))
    for after, made in ((4, False), (5, False), (4, True)):
        inputs = family("llava").make_inputs("one", after=after)
        assert_alike(answer(plain, inputs), answer(graphs, inputs))
        assert (made_by(graphs) > 0) == made


@pytest.mark.slow
def test_a_conversation_goes_on_from_a_padded_prompt() -> None:
    inputs = family("llava").make_inputs("one")
    answers = []
    for prefill in (None, "bucketed"):
        model = compiled("llava", prefill=prefill)
        first = answer(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append(answer(model, again, past_key_values=first.past_key_values))
    assert_alike(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two", "pad4"])
def test_batches_keep_their_length(variant: str) -> None:
    inputs = family("llava").make_inputs(variant)
    assert_alike(*(answer(compiled("llava", prefill=p), inputs) for p in (None, "bucketed")))


@pytest.mark.slow
def test_prompts_for_static_caches_keep_their_length() -> None:
    """Their masks come as [B, 1, S, slots], for Qwen2.5-VL one per kind of layer in a dict."""
    inputs = family("qwen2_5_vl").make_inputs("one")
    plain = answer(compiled("qwen2_5_vl", decode="static"), inputs)
    padded = answer(compiled("qwen2_5_vl", decode="static", prefill="bucketed"), inputs)
    assert_alike(plain, padded)


def test_what_padding_does_not_know_keeps_its_length() -> None:
    cache = DynamicCache()
    ids = torch.ones(1, 9, dtype=torch.int64)
    plain = {"input_ids": ids, "position_ids": ids, "logits_to_keep": 1, "past_key_values": cache}
    assert is_plain_prefill(plain, [cache])
    assert not is_plain_prefill(plain, []), "a cache of the model's own kind"
    assert not is_plain_prefill(plain, [cache, DynamicCache()])
    assert not is_plain_prefill(plain | {"position_ids": None}, [cache])
    assert not is_plain_prefill(plain | {"logits_to_keep": 0}, [cache])
    assert not is_plain_prefill(plain | {"spans": ids}, [cache])
    assert not is_plain_prefill(plain | {"output_hidden_states": True}, [cache])
    assert not is_plain_prefill(plain | {"input_ids": ids.expand(2, -1)}, [cache])
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert not is_plain_prefill(plain, [cache]), "text came before"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prefill": "padded"}, "it can be"),
        ({"prefill": "graphs", "quota": "image"}, "quota"),
        ({"prefill": "graphs", "lowering": "inductor", "mode": "reduce-overhead"}, "mode"),
        ({"prefill": "bucketed", "kv_layout": "layered"}, "kv_layout"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], what: str) -> None:
    with pytest.raises(dartfx.ConfigError, match=what):
        compiled("llava", **options)
