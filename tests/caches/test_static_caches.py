"""Static caches of pruned prompts: lengths, later calls, and sliding windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

import dartfx
from dartfx.model.caches.filling import unfit
from dartfx.model.caches.kv_cache import pruned_length
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Inputs
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN
from tests.support.turns import Conversation, compiled, greedy, llava, one, words

pytestmark = pytest.mark.shares_compiled


def slots(cache: Any) -> set[int]:
    return {layer.keys.shape[2] for layer in cache.layers}


def static(tokens: int) -> Any:
    return StaticCache(llava().model.config, max_cache_len=tokens)


def fresh() -> Any:
    """A model of its own, whose static caches were never longer."""
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}
    return dartfx.compile(copy.deepcopy(llava().model), **settings)


def test_generate_allocates_slots_for_what_is_left() -> None:
    """Up to an eighth more than it needs; a longer prompt's slots stay, as transformers' do."""
    model = fresh()
    how: dict[str, Any] = {"cache_implementation": "static", "max_new_tokens": 5}
    with torch.no_grad():
        model(**one(), past_key_values=static(200))  # a caller's own counts for itself
    greedy(model, input_ids=words(1, 90), **how)  # transformers makes none shorter from now on
    lengths = []
    for before in (5, 25, 5):
        inputs = llava().make_inputs(before=before)
        inputs["input_ids"][:, [1, -2]] = 0  # a token like others, and no pad
        oracle = Conversation(llava(), inputs)
        made = greedy(model, **inputs, **how)
        assert made.sequences[0, -5:-1].tolist() == oracle.answer(4)[0].tolist()
        cache, prompt = made.past_key_values, inputs["input_ids"].shape[1]
        left = prompt + 4 - pruned_length(cache)
        lengths.append(slots(cache).pop())
        assert left <= lengths[-1]
        assert cache.get_max_length() == lengths[-1] + pruned_length(cache) >= prompt + 4
        if len(lengths) < 3:
            assert lengths[-1] <= left * 9 // 8
    assert lengths[0] < lengths[1] == lengths[2]


def test_the_turns_of_a_static_cache() -> None:
    """Text, image, text, image: each image pruned by itself, on what came before."""
    oracle, cache, model = Conversation(llava()), static(120), compiled()
    for turn, said in enumerate((words(1, 9), image(1), words(1, 4), image(2), words(1, 3))):
        call = {"input_ids": said} if isinstance(said, torch.Tensor) else said
        right = oracle.say(said) if isinstance(said, torch.Tensor) else oracle.show(said)
        with torch.no_grad():
            ours = model(**call, past_key_values=cache, use_cache=True)
        assert ours.past_key_values is cache
        torch.testing.assert_close(ours.logits, right, **CLOSE, msg=f"turn {turn}")
    assert int(cache.get_seq_length()) == oracle.attended.shape[1]
    assert pruned_length(cache) == 2 * (llava().tokens_per_image - RETAIN)
    assert slots(cache) == {120}, "text came first, which needs room for all"


def image(seed: int) -> Inputs:
    inputs = llava().make_inputs(seed=seed)
    del inputs["attention_mask"]
    return inputs


@pytest.mark.parametrize("ndim", [2, 4])
def test_a_second_image_in_a_padded_batch(ndim: int) -> None:
    first, second = llava().make_inputs("pad2"), llava().make_inputs("pad2", seed=3)
    oracle, cache = Conversation(llava(), first), static(80)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    tokens = second["input_ids"].shape[1]
    call = second | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]}
    right = oracle.show(call)
    call |= {"attention_mask": mask, "past_key_values": cache}
    with torch.no_grad():
        compiled()(**first, past_key_values=cache)
        if ndim == 4:
            call["attention_mask"] = of_slots(cache, mask, tokens)
        ours = compiled()(**call).logits
    valid = second["attention_mask"].bool().gather(1, oracle.keep_idx)
    torch.testing.assert_close(ours[valid], right[valid], **CLOSE)


def of_slots(cache: Any, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """As ``generate`` makes it: slots by their offset, new pads hidden, those before perhaps."""
    columns, start = cache.get_mask_sizes(tokens, 0)
    places = torch.arange(start, start + columns)
    new = torch.arange(mask.shape[1] - tokens, mask.shape[1])[:, None]
    seen = (places <= new) & torch.nn.functional.pad(mask.bool(), (0, columns))[:, None, places]
    return seen[:, None]


def test_a_static_cache_is_used_again() -> None:
    """A reset gives back the slots that a pruned prompt did without."""
    cache, model = static(60), compiled()
    with torch.no_grad():
        model(**one(), past_key_values=cache)
        assert slots(cache).pop() < 60 <= cache.get_max_length()
        with pytest.raises(dartfx.SelectionError, match=r"40 more tokens .* max_cache_len"):
            model(input_ids=words(1, 40), past_key_values=cache)
        cache.reset()
        said = words(1, 58)
        ours = model(input_ids=said, past_key_values=cache).logits
    assert slots(cache) == {60}
    torch.testing.assert_close(ours, Conversation(llava()).say(said), **CLOSE)


@pytest.mark.parametrize(
    ("window", "variant"), [(8, "pad2"), *slow((8, "one"), (27, "one"), (27, "pad2"), (100, "one"))]
)
def test_static_sliding_windows(window: int, variant: str) -> None:
    """Full after the prompt, while decoding, or never; compared with growing caches.

    Those of a model pruned by hooks, which cannot decode with less than a window; then dartfx's.
    """
    built = load("gemma3", layers=4, sliding_window=window)
    inputs = built.make_inputs(variant)
    how: dict[str, Any] = {"max_new_tokens": 10, "output_logits": True}
    model = dartfx.compile(
        copy.deepcopy(built.model), retain_tokens=RETAIN, lowering="eager", on_unsupported="error"
    )
    if window == 8:
        right = hooked.pruned_generate(
            built.model, inputs, retain=RETAIN, max_new_tokens=10, kv_layout="uniform"
        ).logits
    else:
        right = torch.stack(greedy(model, **inputs, **how).logits, 1)
    ours = greedy(model, **inputs, **how, cache_implementation="static")
    torch.testing.assert_close(torch.stack(ours.logits, 1), right, **CLOSE)
    cache = ours.past_key_values
    held = inputs["input_ids"].shape[1] + 9 - pruned_length(cache)
    for layer in cache.layers:
        assert held <= layer.keys.shape[2] < held * 9 / 8 or layer.keys.shape[2] == window


def test_no_image_comes_on_windows_that_hold_tokens() -> None:
    config = load("gemma3", layers=3, sliding_window=8).model.config.get_text_config()
    states = torch.zeros(1, 1, 3, 4)
    for cache in (StaticCache(config, max_cache_len=20), DynamicCache(config=config)):
        assert unfit([cache]) is None
        cache.update(states, states, 0)
        declined = unfit([cache])
        assert declined is not None
        assert "sliding-window caches that already hold" in declined.because
    plain = DynamicCache()
    plain.update(states, states, 0)
    assert unfit([plain]) is None
    hybrid = DynamicCache(config=config)
    hybrid.layers.insert(0, LinearAttentionLayer())
    assert unfit([hybrid]) is None
    hybrid.update(states, states, 1)
    assert unfit([hybrid]) is not None
