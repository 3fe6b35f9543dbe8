"""Later turns of a conversation: the whole of it computed again, or continued from a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dartfx.tools.bench.generate.figures import markdown
from dartfx.tools.bench.generate.variants import VARIANTS, Ready, Settings, greedy
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.bench.timing import cache_bytes, seconds

__all__ = ["ROWS", "measure_turns", "turns_table"]

QUESTION = 16  # text tokens that a user adds in each turn

# What generates, and whether it goes on from the cache of the turn before.
ROWS: dict[str, tuple[str, bool]] = {
    "plain Inductor, whole conversation": ("plain", False),
    "plain Inductor, its cache": ("plain", True),
    "dart, whole conversation": ("dart", False),
    "dart, its pruned cache": ("dart", True),
}


@dataclass
class _Talk:
    """A conversation in one row: all token ids so far, and the cache of all but the last."""

    label: str
    ready: Ready
    continues: bool
    ids: Tensor
    cache: Any = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def generate(self, new_tokens: int, cache: Any = None) -> Any:
        """This turn's answer; with a cache, which covers the images, from text alone."""
        inputs = self.ready.inputs if cache is None else {}
        ids = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        more = {} if cache is None else {"past_key_values": cache}
        return greedy(self.ready.model, inputs | ids, new_tokens, **more)

    def seconds_of(self, new_tokens: int) -> float:
        """One timed answer; the cache is copied before, so that every call starts alike."""
        cache = copy.deepcopy(self.cache) if self.continues else None
        return seconds(lambda: self.generate(new_tokens, cache))

    def answer(self, new_tokens: int, question: Tensor) -> None:
        """Take the turn, and add what is asked next."""
        done = self.generate(new_tokens, self.cache if self.continues else None)
        self.turns[-1]["kv_bytes"] = cache_bytes(done.past_key_values)
        self.cache = done.past_key_values
        self.ids = torch.cat([done.sequences, question], 1)


def measure_turns(
    work: Workload,
    settings: Settings,
    turns: int,
    new_tokens: int,
    rounds: tuple[int, int],
    step: Callable[[str], object],
) -> list[dict[str, Any]]:
    """First token and decode rate of turns 2 to ``turns``, medians in turns of all rows.

    work: prompts without pads.  new_tokens: of every answer, at least 2.  rounds: warm-up and timed
    calls.  step: called with a row's label for every call.
    """
    ready = {name: VARIANTS[name][1](work, settings) for name in ("plain", "dart")}
    talks = [_Talk(k, ready[n], on, work.inputs["input_ids"]) for k, (n, on) in ROWS.items()]
    generator = torch.Generator().manual_seed(0)
    low, high = 2, int(work.inputs["input_ids"].max()) // 2
    for turn in range(1, turns + 1):
        size = (work.batch, QUESTION)
        question = torch.randint(low, high, size, generator=generator).to(work.model.device)
        for talk in talks:
            talk.turns.append({"turn": turn, "tokens": talk.ids.shape[1]})
        if turn > 1:
            _time(talks, new_tokens, rounds, step)
        for talk in talks:
            talk.answer(new_tokens, question)
    return [{"label": talk.label, "turns": talk.turns[1:]} for talk in talks]


def _time(
    talks: Sequence[_Talk], new_tokens: int, rounds: tuple[int, int], step: Callable[[str], object]
) -> None:
    samples: dict[tuple[str, int], list[float]] = {}
    for number in range(sum(rounds)):
        for talk in talks:
            for length in (1, new_tokens):
                step(talk.label)
                spent = talk.seconds_of(length)
                if number >= rounds[0]:
                    samples.setdefault((talk.label, length), []).append(spent)
    for talk in talks:
        first, total = (median(samples[talk.label, n]) for n in (1, new_tokens))
        rate = talk.ids.shape[0] * (new_tokens - 1) / (total - first) if total > first else None
        talk.turns[-1] |= {"first_token_seconds": first, "decode_tokens_per_second": rate}


def turns_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures of :func:`measure_turns` as Markdown."""
    head = ["", *(f"turn {t['turn']}: {name}" for t in rows[0]["turns"] for name in _COLUMNS)]
    return markdown(head, [[row["label"], *_cells(row["turns"])] for row in rows])


_COLUMNS = ("tokens", "first token, ms", "decode, tokens/s", "KV cache, MB")


def _cells(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for turn in turns:
        rate = turn["decode_tokens_per_second"]
        cells += [str(turn["tokens"]), f"{turn['first_token_seconds'] * 1e3:.1f}"]
        cells += ["-" if rate is None else f"{rate:.1f}", f"{turn['kv_bytes'] / 1e6:.2f}"]
    return cells
