"""Which rows of a batch pass the cut, without vLLM."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.config import DartConfig
from dartfx.integrations.vllm import cut
from dartfx.integrations.vllm.batch import Prompt, plan_step

CONFIG = DartConfig(retain_tokens=16, pivot_text_tokens=8)
PROMPT, FIRST, GENERATED = 40, 2, 5
VISION = torch.zeros(PROMPT, dtype=torch.bool)
VISION[FIRST:34] = True
DROPPED = 32 - 16
LAYER = cut.Layer(torch.nn.Identity(), SimpleNamespace(num_kv_heads=2), ranks=1)


def passing(
    prompts: list[Prompt], counts: list[int], hidden: Tensor, keys: Tensor, starts: list[int]
) -> Tensor:
    """Hidden states that go on; counts: tokens of each request with those of the step."""
    positions = [
        range(count - (end - start), count)
        for count, (start, end) in zip(counts, itertools.pairwise(starts), strict=True)
    ]
    vision = torch.tensor([p < PROMPT and bool(VISION[p]) for p in itertools.chain(*positions)])
    at = torch.tensor(list(itertools.chain(*positions)))
    rows = cut.Rows(at, hidden, torch.zeros_like(hidden), LAYER.keys(keys, CONFIG.selector), vision)
    parts = plan_step(starts, counts, dict(enumerate(prompts)))
    cut.hold(parts, rows)
    rows, held = cut.with_held(parts, rows)
    keep, numbers = cut.rows_kept(CONFIG, LAYER, parts, rows, held)
    assert sum(numbers) == len(keep)
    return rows.hidden[keep]


def test_prompts_of_a_batch_keep_what_each_keeps_alone() -> None:
    hidden, keys = torch.randn(2 * PROMPT, 16), torch.randn(2 * PROMPT, 8)
    alone = [
        dartfx.select_tokens(
            hidden[None, part], keys[part].view(1, PROMPT, 2, 4).transpose(1, 2), VISION[None], 16,
            pivot_text_tokens=8,
        )[0]
        for part in (slice(0, PROMPT), slice(PROMPT, None))
    ]  # fmt: skip
    prompts = [Prompt(PROMPT, FIRST, DROPPED) for _ in range(2)]
    made = passing(prompts, [PROMPT, PROMPT], hidden, keys, [0, PROMPT, 2 * PROMPT])
    assert torch.equal(made, hidden[torch.cat([alone[0], alone[1] + PROMPT])])


def test_a_preempted_request_keeps_what_it_kept_at_first() -> None:
    """Its generated tokens follow the prompt now; the largest key norms would make them pivots."""
    hidden, keys = torch.randn(PROMPT + GENERATED, 16), torch.randn(PROMPT + GENERATED, 8)
    keys[PROMPT:] *= 100
    prompt, both = Prompt(PROMPT, FIRST, DROPPED), PROMPT + GENERATED
    first = passing([prompt], [PROMPT], hidden[:PROMPT], keys[:PROMPT], [0, PROMPT])
    again = passing([prompt], [both], hidden, keys, [0, both])
    assert torch.equal(again, torch.cat([first, hidden[PROMPT:]]))


@pytest.mark.parametrize("ends", [[1, 2, 40], [7, 20, 39, 40], [33, 43, 45], list(range(1, 46))])
def test_a_prompt_in_chunks_keeps_what_it_keeps_whole(ends: list[int]) -> None:
    hidden, keys = torch.randn(PROMPT + GENERATED, 16), torch.randn(PROMPT + GENERATED, 8)
    prompt, end = Prompt(PROMPT, FIRST, DROPPED), ends[-1]
    whole = passing([prompt], [end], hidden[:end], keys[:end], [0, end])
    made, start = [], 0
    for stop in ends:
        made.append(
            passing([prompt], [stop], hidden[start:stop], keys[start:stop], [0, stop - start])
        )
        start = stop
    assert torch.equal(torch.cat(made), whole)
    assert prompt.held is None
    waiting = [len(rows) for rows, stop in zip(made, ends, strict=True) if stop < PROMPT]
    assert sum(waiting) == FIRST


def test_a_prompt_that_begins_again_drops_what_was_held() -> None:
    hidden, keys = torch.randn(PROMPT, 16), torch.randn(PROMPT, 8)
    prompt = Prompt(PROMPT, FIRST, DROPPED)
    whole = passing([prompt], [PROMPT], hidden, keys, [0, PROMPT])
    passing([prompt], [20], torch.randn(20, 16), torch.randn(20, 8), [0, 20])
    assert len(prompt.held) == 20 - FIRST
    assert torch.equal(passing([prompt], [PROMPT], hidden, keys, [0, PROMPT]), whole)


def test_what_a_prefix_cache_has_need_not_come() -> None:
    """Only tokens before the first image are shared, and none of those is looked at."""
    hidden, keys = torch.randn(PROMPT, 16), torch.randn(PROMPT, 8)
    prompt = Prompt(PROMPT, FIRST, DROPPED)
    whole = passing([prompt], [PROMPT], hidden, keys, [0, PROMPT])
    made = passing([prompt], [PROMPT], hidden[FIRST:], keys[FIRST:], [0, PROMPT - FIRST])
    assert torch.equal(made, whole[FIRST:])
    with pytest.raises(RuntimeError, match="a chunk begins at token 3 of a prompt"):
        passing([prompt], [PROMPT], hidden[3:], keys[3:], [0, PROMPT - 3])


def test_other_vision_tokens_than_the_scheduler_counted_are_an_error() -> None:
    hidden, keys = torch.randn(PROMPT, 16), torch.randn(PROMPT, 8)
    with pytest.raises(RuntimeError, match="has 32 vision tokens, which does not go with the 15"):
        passing([Prompt(PROMPT, FIRST, 15)], [PROMPT], hidden, keys, [0, PROMPT])
