"""A step's requests at the cut, without vLLM: rows that pass, rows held, KV slots."""

from __future__ import annotations

import itertools

import pytest
import torch

from dartfx.integrations.vllm.batch import Prompt, compact_slots, pieces, plan_step, where_stored


def test_prompts_and_decode_steps_of_one_step() -> None:
    # A prompt of 6 whose image begins at 1, one more token of a request, a text prompt, and a
    # prompt of 5 with two generated tokens behind it, after a preemption.
    prompts = {0: Prompt(6, 1, 2), 1: Prompt(25, 3, 10), 3: Prompt(5, 0, 1)}
    parts = plan_step([0, 6, 7, 9, 16], [6, 30, 2, 7], prompts)
    assert [part.selects for part in parts] == [True, False, False, True]
    assert [(part.seen_from, part.seen_to) for part in parts] == [(1, 6), (6, 6), (9, 9), (9, 14)]
    assert [part.length for part in parts] == [4, 20, 2, 6]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 20])
def test_chunks_of_a_prompt(chunk: int) -> None:
    """Text before the image passes at once; from there on rows wait for the prompt's end."""
    prompt, end = Prompt(11, 4, 5), 14  # three generated tokens follow
    passed, selecting = [], []
    for start in range(0, end, chunk):
        count = min(start + chunk, end)
        (part,) = plan_step([3, 3 + count - start], [count], {0: prompt})
        rows = [*range(part.start, part.seen_from), *range(part.seen_to, part.end)]
        passed += [start + row - 3 for row in rows]
        selecting.append(part.selects)
        assert part.length == (count - 5 if count >= 11 else min(count, 4))
        assert not part.sees or part.position == max(start, 4)
    assert passed == [0, 1, 2, 3, 11, 12, 13]
    assert [i for i, yes in enumerate(selecting) if yes] == [10 // chunk]


def test_a_prompt_that_drops_nothing_passes() -> None:
    (part,) = plan_step([0, 4], [4], {})
    assert not part.sees
    assert part.length == 4
    assert [Prompt(9, 2, 0).behind(count) for count in (1, 5, 12)] == [1, 5, 12]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_more_rows_than_layers_take_go_in_pieces(most: int) -> None:
    rows, lengths = [4, 0, 1, 3], [4, 7, 10, 5]
    made = list(pieces(rows, lengths, most))
    assert all(sum(taken) <= most for taken, _ in made)
    for request, (count, length) in enumerate(zip(rows, lengths, strict=True)):
        at = [
            position
            for taken, after in made
            for position in range(after[request] - taken[request], after[request])
        ]
        assert at == list(range(length - count, length))


@pytest.mark.parametrize("block", [1, 2, 16])
def test_slots_are_those_of_the_last_tokens_in_a_row_of_blocks(block: int) -> None:
    rows, lengths = [4, 1, 3], [4, 10, 5]
    blocks = torch.randperm(3 * 10).view(3, 10)
    made = compact_slots(blocks, *where_stored(rows, torch.tensor(lengths)), block).tolist()
    wanted = [
        int(blocks[i, p // block]) * block + p % block
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
        for p in range(length - row, length)
    ]
    assert made == wanted
    assert len(set(itertools.chain(made))) == sum(rows)
