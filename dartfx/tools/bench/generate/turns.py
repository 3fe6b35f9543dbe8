"""Later turns of a conversation: recomputed as a whole, or continued from a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dartfx.tools.bench.generate.figures import markdown
from dartfx.tools.bench.generate.rows import Row, reason
from dartfx.tools.bench.generate.variants import Ready, greedy
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.bench.timing import cache_bytes, seconds

__all__ = ["LABELS", "QUESTION", "Talk", "converse", "talks_of", "turns_table"]

QUESTION = 16  # text tokens that a user adds in each turn

# By row of the benchmark: without the cache of the turn before, and with it.
LABELS: dict[str, tuple[str, str]] = {
    "plain": ("plain Inductor, whole conversation", "plain Inductor, its cache"),
    "dart": ("dart, whole conversation", "dart, its pruned cache"),
}


@dataclass
class Talk:
    """A conversation in one way: all token ids so far, and the cache of all but the last."""

    label: str
    ready: Ready
    continues: bool
    ids: Tensor
    cache: Any = None
    failed: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, list[float]] = field(default_factory=dict)

    def attempt(self, call: Callable[[], object]) -> None:
        """Make a call unless one has failed before; its exception is why this row has no more."""
        if self.failed:
            return
        try:
            call()
        except Exception as error:
            self.failed = reason(error)

    def begin(self, turn: int, ids: Tensor | None = None) -> None:
        """Begin a turn; ids: the first one's."""
        if ids is not None:
            self.ids, self.cache, self.turns = ids, None, []
        self.turns.append({"turn": turn, "tokens": self.ids.shape[1]})
        self.samples = {}

    def generate(self, new_tokens: int, cache: Any = None) -> Any:
        """This turn's answer; with a cache, which covers the images, from text alone."""
        inputs = self.ready.inputs if cache is None else {}
        ids = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        more = {} if cache is None else {"past_key_values": cache}
        return greedy(self.ready.model, inputs | ids, new_tokens, **more)

    def time(self, new_tokens: int) -> None:
        """One timed answer; the cache is copied before, so that every call starts alike."""
        cache = copy.deepcopy(self.cache) if self.continues else None
        spent = seconds(lambda: self.generate(new_tokens, cache))
        self.samples.setdefault(new_tokens, []).append(spent)

    def note(self) -> None:
        """The turn's figures by its samples so far."""
        if self.failed or len(self.samples) < 2:
            return
        (_, first), (longest, total) = sorted((n, median(s)) for n, s in self.samples.items())
        tokens = self.ids.shape[0] * (longest - 1)
        rate = tokens / (total - first) if total > first else None
        self.turns[-1] |= {"first_token_seconds": first, "decode_tokens_per_second": rate}

    def answer(self, new_tokens: int, question: Tensor) -> None:
        """Take the turn, and add the next question."""
        done = self.generate(new_tokens, self.cache if self.continues else None)
        self.cache = done.past_key_values
        self.turns[-1]["kv_bytes"] = cache_bytes(self.cache)
        self.ids = torch.cat([done.sequences, question], 1)


def talks_of(rows: Sequence[Row], ids: Tensor) -> list[Talk]:
    """Two conversations in each row that has any and did not fail."""
    return [
        Talk(label, row.ready, continues, ids)
        for row in rows
        if row.ready is not None
        for continues, label in zip((False, True), LABELS.get(row.name, ()), strict=False)
    ]


def converse(
    talks: Sequence[Talk],
    work: Workload,
    turns: int,
    new_tokens: int,
    repeat: int,
    step: Callable[[str], object],
) -> Iterator[list[dict[str, Any]]]:
    """First token and decode rate of turns 2 to ``turns``, medians of calls in turns of all rows.

    work: prompts without pads.  new_tokens: of every answer, at least 2.  step: called with a row's
    label for every timed call.  Yields all figures so far, after each of ``repeat`` rounds and
    after each turn.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = 2, int(work.inputs["input_ids"].max()) // 2
    for turn in range(1, turns + 1):
        size = (work.batch, QUESTION)
        question = torch.randint(low, high, size, generator=generator).to(work.model.device)
        for talk in talks:
            talk.begin(turn, work.inputs["input_ids"] if turn == 1 else None)
        for _ in range(repeat if turn > 1 else 0):
            for talk in talks:
                for length in (1, new_tokens):
                    step(talk.label)
                    talk.attempt(lambda t=talk, n=length: t.time(n))  # type: ignore[misc]
                talk.note()
            yield _figures(talks)
        for talk in talks:
            talk.attempt(lambda t=talk, q=question: t.answer(new_tokens, q))  # type: ignore[misc]
        yield _figures(talks)


def _figures(talks: Sequence[Talk]) -> list[dict[str, Any]]:
    return [
        {"label": talk.label, "failed": talk.failed, "turns": copy.deepcopy(talk.turns[1:])}
        for talk in talks
    ]


def turns_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures of :func:`converse` as Markdown, and why rows failed."""
    turns = max((row["turns"] for row in rows), key=len)
    head = ["", *(f"turn {t['turn']}: {name}" for t in turns for name in _COLUMNS)]
    good = [[row["label"], *_cells(row["turns"])] for row in rows if not row["failed"]]
    failed = [f"{row['label']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n\n".join([markdown(head, good), *failed])


_COLUMNS = ("tokens", "first token, ms", "decode, tokens/s", "KV cache, MB")


def _cells(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for turn in turns:
        rate = turn["decode_tokens_per_second"]
        cells += [str(turn["tokens"]), f"{turn['first_token_seconds'] * 1e3:.1f}"]
        cells += ["-" if rate is None else f"{rate:.1f}", f"{turn['kv_bytes'] / 1e6:.2f}"]
    return cells
