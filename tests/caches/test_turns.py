"""Calls that continue a pruned KV cache, against a full cache with dropped columns masked."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import dartfx
from tests.support.tolerances import CLOSE, RETAIN
from tests.support.turns import (
    Conversation,
    compiled,
    first_turn,
    greedy,
    llava,
    one,
    words,
)

pytestmark = pytest.mark.shares_compiled

# --- turns -----------------------------------------------------------------------------------


def test_three_turns_of_a_row() -> None:
    oracle, cache = Conversation(llava(), one()), first_turn(one())
    bare = copy.deepcopy(cache)
    for turn in range(2):
        said = words(1, 4 + turn, seed=turn)
        right = oracle.say(said)
        with torch.no_grad():
            ours = compiled()(input_ids=said, past_key_values=cache).logits
            # The cache itself knows, so a model without dartfx continues it as well.
            plain = llava().model(input_ids=said, past_key_values=bare).logits
        torch.testing.assert_close(ours, right, **CLOSE)
        torch.testing.assert_close(plain, right, **CLOSE)
    assert cache.get_seq_length() == oracle.attended.shape[1]


def test_generate_is_given_the_whole_conversation_and_the_cache() -> None:
    oracle = Conversation(llava(), one())
    cache, conversation = None, one()["input_ids"]
    for turn in range(3):
        more = one() if turn == 0 else {"attention_mask": torch.ones_like(conversation)}
        more |= {"input_ids": conversation, "past_key_values": cache}
        made = greedy(compiled(), **more, max_new_tokens=5)
        cache = made.past_key_values
        right = oracle.answer(4)
        last = oracle.logits[:, -1:].argmax(-1)
        assert made.sequences[:, -5:].tolist() == torch.cat([right, last], 1).tolist()
        said = words(1, 6, seed=turn)
        oracle.say(torch.cat([last, said], 1))
        conversation = torch.cat([made.sequences, said], 1)


def test_turns_of_a_ragged_batch_with_pads_between_them() -> None:
    inputs = llava().make_inputs("ragged")
    oracle, cache, mask = (
        Conversation(llava(), inputs),
        first_turn(inputs),
        inputs["attention_mask"],
    )
    for turn in range(2):
        said = words(2, 5, seed=turn)
        new = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        right = oracle.say(said, new.bool())
        mask = torch.cat([mask, new], 1)
        call = {
            "input_ids": said,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -5:],
            "past_key_values": cache,
        }
        with torch.no_grad():
            ours = compiled()(**call).logits
        torch.testing.assert_close(ours[0], right[0], **CLOSE)
        torch.testing.assert_close(ours[1, 2:], right[1, 2:], **CLOSE)


def test_masks_of_all_tokens_and_of_those_left() -> None:
    inputs = llava().make_inputs("pad2")
    oracle, cache, mask = (
        Conversation(llava(), inputs),
        first_turn(inputs),
        inputs["attention_mask"],
    )
    said = words(2, 3)
    right = oracle.say(said)
    new = torch.ones(2, 3, dtype=torch.int64)
    positions = (oracle.attended.cumsum(1) - 1)[:, -3:]
    left = torch.cat([mask.gather(1, oracle.keep_idx), new], 1)
    causal = torch.ones(3, left.shape[1], dtype=torch.bool).tril(left.shape[1] - 3)
    whole = torch.cat([mask, new], 1)
    causal_whole = torch.ones(3, whole.shape[1], dtype=torch.bool).tril(whole.shape[1] - 3)
    masks = [
        whole,
        left,
        left[:, None, None].bool() & causal,
        whole[:, None, None].bool() & causal_whole,
    ]
    for given in masks:
        call = {"input_ids": said, "attention_mask": given, "position_ids": positions}
        with torch.no_grad():
            ours = compiled()(**call, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(ours, right, **CLOSE)
    call["attention_mask"] = whole[:, 1:]
    with pytest.raises(dartfx.SelectionError, match=r"mask of 3. columns .* give one of"):
        compiled()(**call, past_key_values=copy.deepcopy(cache))
    call["attention_mask"] = torch.cat([whole, whole])
    with pytest.raises(dartfx.SelectionError, match="mask of 4 rows"):
        compiled()(**call, past_key_values=copy.deepcopy(cache))


def test_pads_are_refused_by_the_cache_where_no_mask_is_fitted() -> None:
    inputs = llava().make_inputs("pad2")
    cache, mask = first_turn(inputs), inputs["attention_mask"]
    with torch.no_grad(), pytest.raises(dartfx.SelectionError, match="only a model compiled by"):
        llava().model(
            input_ids=words(2, 1),
            attention_mask=torch.cat([mask, mask[:, -1:]], 1),
            past_key_values=cache,
        )


def test_layers_that_hold_different_tokens_take_one_token_at_a_time() -> None:
    model = dartfx.compile(
        copy.deepcopy(llava().model), retain_tokens=RETAIN, lowering="eager", kv_layout="layered"
    )
    with torch.no_grad():
        cache = model(**one(), use_cache=True).past_key_values
        assert cache.get_seq_length() == one()["input_ids"].shape[1]
        model(input_ids=words(1, 1), past_key_values=cache)
        with pytest.raises(dartfx.SelectionError, match="Compile with the default kv_layout"):
            model(input_ids=words(1, 2), past_key_values=cache)


@pytest.mark.slow
def test_a_row_alone_padded_and_in_a_batch_decodes_the_same() -> None:
    batch = llava().make_inputs("pad2")
    alone = llava().row(batch, 0)
    del alone["attention_mask"]
    padded = {
        "input_ids": torch.nn.functional.pad(alone["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(alone["input_ids"]), (3, 0)),
        "pixel_values": alone["pixel_values"],
    }
    steps = {"max_new_tokens": 4, "output_logits": True}
    first, *others = [
        torch.stack(greedy(compiled(), **inputs, **steps).logits)[:, :1]
        for inputs in (alone, padded, batch)
    ]
    for other in others:
        torch.testing.assert_close(other, first, **CLOSE)


def test_a_prompt_with_images_is_not_computed_in_chunks() -> None:
    inputs = llava().make_inputs()
    length = inputs["input_ids"].shape[1]
    with pytest.raises(dartfx.SelectionError, match=f"prefill_chunk_size=4 feeds .* {length} tok"):
        greedy(compiled(), **inputs, prefill_chunk_size=4, max_new_tokens=2)
    text = greedy(compiled(), input_ids=words(1, 9), prefill_chunk_size=4, max_new_tokens=2)
    assert text.sequences.shape == (1, 11)


# --- drafts, beams, rows ---------------------------------------------------------------------


def test_drafts_are_taken_back() -> None:
    right = greedy(compiled(), **one(), max_new_tokens=14).sequences.tolist()
    oracle = Conversation(llava(), one()).answer(14)
    assert right[0][-14:] == oracle[0].tolist()
    looked_up = greedy(compiled(), **one(), max_new_tokens=14, prompt_lookup_num_tokens=3)
    assert looked_up.sequences.tolist() == right
    assert looked_up.past_key_values.get_seq_length() == len(right[0]) - 1


@pytest.mark.slow
def test_an_assistant_drafts_for_a_pruned_model() -> None:
    assistant = copy.deepcopy(llava().model)
    right = greedy(compiled(), **one(), max_new_tokens=8).sequences.tolist()
    ours = greedy(compiled(), **one(), max_new_tokens=8, assistant_model=assistant)
    assert ours.sequences.tolist() == right


@pytest.mark.slow
def test_rows_of_a_cache_are_repeated_chosen_and_reordered() -> None:
    inputs = llava().make_inputs("ragged")
    cache, mask = first_turn(inputs), inputs["attention_mask"]
    rows = torch.tensor([1, 0, 1, 1])
    chosen = copy.deepcopy(cache)
    chosen.batch_repeat_interleave(2)
    chosen.batch_select_indices(torch.tensor([3, 0, 2]))
    chosen.reorder_cache(torch.tensor([0, 1, 2, 2]))
    said = words(2, 3)
    oracle = Conversation(llava(), inputs)
    right = oracle.say(said)[rows]
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)[rows]
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -3:]}
    with torch.no_grad():
        ours = compiled()(input_ids=said[rows], past_key_values=chosen, **call).logits
    torch.testing.assert_close(ours, right, **CLOSE)


@pytest.mark.slow
def test_a_cache_is_cropped_to_the_end_of_the_image() -> None:
    oracle, cache = Conversation(llava(), one()), first_turn(one())
    said = words(1, 4)
    oracle.take_back(3)
    right = oracle.say(said)
    with torch.no_grad():
        compiled()(input_ids=words(1, 5, seed=9), past_key_values=cache)
        cache.crop(-8)  # that turn, and three words of the prompt
        ours = compiled()(input_ids=said, past_key_values=cache).logits
    torch.testing.assert_close(ours, right, **CLOSE)


def test_rows_that_would_be_left_with_different_tokens_are_not_cropped() -> None:
    cache = first_turn(llava().make_inputs("ragged"))
    with pytest.raises(dartfx.SelectionError, match="rows or layers hold different ones"):
        cache.crop(-30)


# --- kept, moved, continued elsewhere --------------------------------------------------------


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_of_a_cache_know_the_same() -> None:
    inputs = llava().make_inputs("ragged")
    cache, mask = first_turn(inputs), inputs["attention_mask"]
    said = words(2, 2)
    right = Conversation(llava(), inputs).say(said)
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -2:]}
    for other in (copy.deepcopy(cache), saved(cache), pickle.loads(pickle.dumps(cache))):
        with torch.no_grad():
            ours = compiled()(input_ids=said, past_key_values=other, **call).logits
        torch.testing.assert_close(ours, right, **CLOSE)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
