"""The KV cache of a pruned call: its counts, images added to one, and caches from elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import dartfx
from dartfx.errors import SelectionError
from dartfx.model.arguments import Arguments, with_decode_masks
from dartfx.model.caches import kv_cache
from dartfx.model.caches.weights import Weights
from dartfx.runtime.keep_idx import KeepIdxRecord
from dartfx.tools.zoo.family import Inputs
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN
from tests.support.turns import Conversation, compiled, first_turn, greedy, llava, one, words

pytestmark = pytest.mark.shares_compiled


def pruned_cache(keep_idx: torch.Tensor, prompt: int) -> Any:
    """A cache of one layer that holds ``keep_idx`` [B, S'] of ``prompt`` tokens."""
    cache = DynamicCache()
    keys = torch.zeros(keep_idx.shape[0], 1, keep_idx.shape[1], 2)
    cache.update(keys, keys, 0)
    kv_cache.mark_pruned(cache, prompt, [KeepIdxRecord(keep_idx)])
    return cache


def test_it_states_what_it_saw_and_what_it_holds() -> None:
    cache = pruned_cache(torch.tensor([[0, 2, 4], [2, 3, 4]]), prompt=5)
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(4, 0) == (3 + 4, 2)
    assert kv_cache.pruned_length(cache) == 2
    cache.reset()
    assert (cache.get_seq_length(), kv_cache.pruned_length(cache)) == (0, 0)


def test_masks_get_the_kept_columns_last() -> None:
    cache = pruned_cache(torch.tensor([[0, 2, 4], [2, 3, 4]]), prompt=5)
    prompt = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    padded = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    for mask, kept in ((prompt, [[1, 1, 1], [1, 1, 1]]), (padded, [[0, 1, 1], [0, 1, 1]])):
        whole = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
        expected = [[*row, 1, 1] for row in kept]
        fitted = kv_cache.fit_mask(cache, whole, 2)
        assert fitted[:, 2:].tolist() == expected
        assert not fitted[:, :2].any()
        four = kv_cache.fit_mask(cache, whole[:, None, None].float(), 2)
        assert four[:, 0, 0].tolist() == expected
        assert torch.equal(kv_cache.fit_mask(cache, fitted[:, 2:], 2), fitted)


def test_other_rows_than_the_caches_are_refused() -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    with pytest.raises(SelectionError, match=r"mask of 4 rows .* pruned with 2 rows"):
        kv_cache.fit_mask(cache, torch.ones(4, 4, dtype=torch.int64), 1)


def test_decode_steps_do_not_ask_for_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a static cache every question waits for the device."""
    cache, step = (
        pruned_cache(torch.tensor([[0, 2]]), prompt=3),
        torch.ones(1, 1, dtype=torch.int64),
    )
    by_another_name = torch.ones(1, 4, dtype=torch.int64)
    call = Arguments.of(lambda: None, (), {"input_ids": step, "seen": by_another_name})
    fitted = with_decode_masks(call, [cache])
    assert fitted.kwargs["seen"].tolist() == [[0, 1, 1, 1]]
    monkeypatch.setattr(cache, "get_seq_length", None)
    call = Arguments.of(lambda: None, (), {"input_ids": step, "position_ids": step})
    assert with_decode_masks(call, [cache]) is call


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_a_mask_of_another_length_is_refused(columns: int) -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    with pytest.raises(SelectionError, match="holds 2 of 3 tokens; give one of 4 columns"):
        kv_cache.fit_mask(cache, torch.ones(2, columns, dtype=torch.int64), 1)


def test_a_cache_of_an_earlier_or_another_call_stays() -> None:
    cache = DynamicCache()
    keys = torch.zeros(1, 1, 9, 2)
    cache.update(keys, keys, 0)
    for kept, prompt in (([[0, 2]], 3), ([[0, 2]], 12)):
        kv_cache.mark_pruned(cache, prompt, [KeepIdxRecord(torch.tensor(kept))])
        assert kv_cache.pruned_length(cache) == 0


# --- images that come on a cache, each pruned by itself ---------------------------------------


def image(seed: int, variant: str = "one") -> Inputs:
    inputs = llava().make_inputs(variant, seed=seed)
    if variant == "one":
        del inputs["attention_mask"]
    return inputs


def test_images_and_text_in_turns() -> None:
    """Text, image, text, image: each image pruned by itself, on what came before."""
    oracle, cache = Conversation(llava()), None
    for turn, said in enumerate((words(1, 9), image(1), words(1, 4), image(2), words(1, 3))):
        call = {"input_ids": said} if isinstance(said, torch.Tensor) else said
        right = oracle.say(said) if isinstance(said, torch.Tensor) else oracle.show(said)
        with torch.no_grad():
            ours = compiled()(**call, past_key_values=cache, use_cache=True)
        cache = ours.past_key_values
        torch.testing.assert_close(ours.logits, right, **CLOSE, msg=f"turn {turn}")
    assert cache.get_seq_length() == oracle.attended.shape[1]
    dropped = 2 * (llava().tokens_per_image - RETAIN)
    assert {layer.keys.shape[2] for layer in cache.layers} == {cache.get_seq_length() - dropped}


@pytest.mark.parametrize("variant", ["ragged", *slow("pad2")])
def test_a_second_image_in_a_batch(variant: str) -> None:
    first, second = llava().make_inputs(variant), llava().make_inputs(variant, seed=3)
    oracle, cache = Conversation(llava(), first), first_turn(first)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    tokens = second["input_ids"].shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    call = second | {"position_ids": positions}
    right = oracle.show(call)
    call |= {"attention_mask": mask, "past_key_values": cache}
    with torch.no_grad():
        ours = compiled()(**call).logits
    valid = second["attention_mask"].bool().gather(1, oracle.keep_idx)
    torch.testing.assert_close(ours[valid], right[valid], **CLOSE)
    said = words(2, 2)
    right = oracle.say(said)
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -2:]}
    with torch.no_grad():
        ours = compiled()(input_ids=said, past_key_values=cache, **call).logits
    torch.testing.assert_close(ours, right, **CLOSE)


def test_generate_takes_a_second_image_with_the_whole_conversation() -> None:
    oracle = Conversation(llava(), image(0))
    made = greedy(compiled(), **image(0), max_new_tokens=4)
    oracle.answer(3)
    last = oracle.logits[:, -1:].argmax(-1)
    more = image(5)
    conversation = torch.cat([made.sequences, more["input_ids"]], 1)
    oracle.show(more | {"input_ids": torch.cat([last, more["input_ids"]], 1)})
    second = greedy(
        compiled(),
        input_ids=conversation,
        attention_mask=torch.ones_like(conversation),
        pixel_values=more["pixel_values"],
        past_key_values=made.past_key_values,
        max_new_tokens=4,
    )
    assert second.sequences[0, -4:].tolist() == oracle.answer(4)[0].tolist()


def test_an_image_is_taken_back() -> None:
    oracle, cache = Conversation(llava(), image(0)), first_turn(image(0))
    right = oracle.say(words(1, 3))
    with torch.no_grad():
        compiled()(**image(4), past_key_values=cache)
        cache.crop(-image(4)["input_ids"].shape[1])
        ours = compiled()(input_ids=words(1, 3), past_key_values=cache).logits
    torch.testing.assert_close(ours, right, **CLOSE)


# --- caches from elsewhere -------------------------------------------------------------------


def test_a_cache_that_was_pruned_with_other_options_is_continued() -> None:
    other = dartfx.compile(copy.deepcopy(llava().model), retain_tokens=3, lowering="eager")
    oracle = Conversation(llava())
    oracle.show(one(), retain=3)
    right = oracle.say(words(1, 3))
    with torch.no_grad():
        cache = other(**one(), use_cache=True).past_key_values
        ours = compiled()(input_ids=words(1, 3), past_key_values=cache).logits
    torch.testing.assert_close(ours, right, **CLOSE)


def test_a_cache_that_other_weights_filled_is_refused(tmp_path: Path) -> None:
    """Not one of the same weights, however they came into memory."""
    cache, settings = first_turn(one()), {"retain_tokens": RETAIN, "lowering": "eager"}
    torch.save(cache, tmp_path / "cache.pt")
    llava().model.save_pretrained(tmp_path)
    loaded = dartfx.compile(type(llava().model).from_pretrained(tmp_path), **settings)
    other = copy.deepcopy(llava().model)
    with torch.no_grad():
        right = compiled()(input_ids=words(1, 1), past_key_values=copy.deepcopy(cache)).logits
        saved = torch.load(tmp_path / "cache.pt", weights_only=False)
        ours = loaded(input_ids=words(1, 1), past_key_values=saved).logits
        torch.testing.assert_close(ours, right, **CLOSE)
        # As of another checkpoint, or after a step of training.
        other.get_decoder().layers[-1].self_attn.v_proj.weight.mul_(1.1)
        for tokens in (1, 3):
            with pytest.raises(dartfx.SelectionError, match="filled with other weights than"):
                dartfx.compile(other, **settings)(
                    input_ids=words(1, tokens), past_key_values=copy.deepcopy(cache)
                )


def test_decode_steps_do_not_look_at_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, own = [], Weights.digest
    monkeypatch.setattr(Weights, "digest", lambda self: looked.append(1) or own(self))
    greedy(compiled(), **one(), max_new_tokens=6)
    assert len(looked) == 2, "once to mark the cache, once in the first step"


def test_a_cache_is_cropped_into_its_image() -> None:
    """What is left are the kept ones of the first tokens."""
    oracle, cache = Conversation(llava(), one()), first_turn(one())
    oracle.take_back(15)
    right = oracle.say(words(1, 4))
    cache.crop(-15)
    with torch.no_grad():
        ours = compiled()(input_ids=words(1, 4), past_key_values=cache).logits
    torch.testing.assert_close(ours, right, **CLOSE)


def test_what_a_cache_knows_fits_masks_on_another_device() -> None:
    cache = first_turn(llava().make_inputs("pad2"))
    seen = int(cache.get_seq_length()) + 1
    fitted = kv_cache.fit_mask(cache, torch.ones(2, seen, dtype=torch.int64, device="meta"), 1)
    assert fitted.device.type == "meta"
    assert fitted.shape == (2, seen)


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", *slow("assistant_model")])
def test_drafts_in_a_later_turn(how: str) -> None:
    """transformers takes the whole conversation for new tokens in a draft's first step."""
    oracle = Conversation(llava(), one())
    cache = greedy(compiled(), **one(), max_new_tokens=3).past_key_values
    said = torch.cat([oracle.answer(2), oracle.logits[:, -1:].argmax(-1), words(1, 4)], 1)
    oracle.say(said[:, 2:])
    conversation = torch.cat([one()["input_ids"], said], 1)
    drafts: Any = {"prompt_lookup_num_tokens": 3, "assistant_model": llava().model}
    made = greedy(
        compiled(),
        input_ids=conversation,
        attention_mask=torch.ones_like(conversation),
        past_key_values=cache,
        max_new_tokens=6,
        **{how: drafts[how]},
    )
    assert made.sequences[0, -6:].tolist() == oracle.answer(6)[0].tolist()


def test_a_bare_compile_refuses_what_its_short_caches_cannot_know() -> None:
    model = copy.deepcopy(llava().model)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "kv_layout": "uniform"}
    model.compile(backend="dart", options=options | {"on_unsupported": "error"})
    inputs = llava().make_inputs("pad2")
    made = greedy(model, **inputs, max_new_tokens=3)
    oracle = Conversation(llava(), inputs).answer(3)
    assert made.sequences[:, -3:].tolist() == oracle.tolist(), "generate gives positions"
    cache, length = made.past_key_values, made.sequences.shape[1]
    positions = torch.arange(length - 1, length + 1).expand(2, -1)
    with torch.no_grad():
        for tokens, given in ((1, None), (2, positions)):
            call = {"input_ids": words(2, tokens), "past_key_values": copy.deepcopy(cache)}
            with pytest.raises(dartfx.SelectionError, match=r"use dartfx\.compile"):
                model(**call, position_ids=given)


def test_a_bare_compile_refuses_an_image_on_a_cache() -> None:
    model = copy.deepcopy(llava().model)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}
    model.compile(backend="dart", options=options)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=words(1, 4), past_key_values=cache)
        with pytest.raises(Exception, match=r"already holds tokens.*\n.*dartfx\.compile"):
            greedy(model, **one(), past_key_values=cache, max_new_tokens=1)
