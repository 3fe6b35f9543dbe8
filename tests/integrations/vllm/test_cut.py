"""Which rows of a batch pass the cut, without vLLM."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch

import dartfx
from dartfx.config import DartConfig
from dartfx.integrations.vllm import cut, options
from dartfx.integrations.vllm.batch import plan_step

CONFIG = DartConfig(retain_tokens=16, pivot_text_tokens=8)
PROMPT, GENERATED = 40, 5
VISION = torch.zeros(PROMPT, dtype=torch.bool)
VISION[2:34] = True
LAYER = cut.Layer(torch.nn.Identity(), SimpleNamespace(num_kv_heads=2), ranks=1)


def kept(hidden: torch.Tensor, keys: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Rows kept of prompts that lie one after the other, each of PROMPT rows and what follows."""
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    vision = torch.cat(
        [torch.nn.functional.pad(VISION, (0, length - PROMPT)) for length in lengths]
    )
    prompts = dict.fromkeys(range(len(lengths)), PROMPT)
    step = plan_step(starts, lengths, prompts, vision, lambda n: options.dropped(CONFIG, n))
    rows = cut.rows_kept(CONFIG, LAYER, step, hidden, torch.zeros_like(hidden), keys)
    assert rows is not None
    assert len(rows) == sum(step.rows_left)
    return rows


def test_prompts_of_a_batch_keep_what_each_keeps_alone() -> None:
    hidden, keys = torch.randn(2 * PROMPT, 16), torch.randn(2 * PROMPT, 8)
    alone = [
        dartfx.select_tokens(
            hidden[None, part], keys[part].view(1, PROMPT, 2, 4).transpose(1, 2), VISION[None], 16,
            pivot_text_tokens=8,
        )[0]
        for part in (slice(0, PROMPT), slice(PROMPT, None))
    ]  # fmt: skip
    wanted = torch.cat([alone[0], alone[1] + PROMPT])
    assert torch.equal(kept(hidden, keys, [0, PROMPT, 2 * PROMPT]), wanted)


def test_a_preempted_request_keeps_what_it_kept_at_first() -> None:
    """Its generated tokens follow the prompt now; the largest key norms would make them pivots."""
    hidden, keys = torch.randn(PROMPT + GENERATED, 16), torch.randn(PROMPT + GENERATED, 8)
    keys[PROMPT:] *= 100
    first = kept(hidden[:PROMPT], keys[:PROMPT], [0, PROMPT])
    again = kept(hidden, keys, [0, PROMPT + GENERATED])
    assert torch.equal(again, torch.cat([first, torch.arange(PROMPT, PROMPT + GENERATED)]))
