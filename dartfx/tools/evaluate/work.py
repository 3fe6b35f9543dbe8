"""The model with its prompts, in this process or in several."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from dartfx.integrations.hf import load_model, to_model
from dartfx.tools.evaluate.answers import (
    Answers,
    Choice,
    PrunedModel,
    answer,
    encode_once,
    vision_tokens,
)
from dartfx.tools.evaluate.questions import Batch, batches, load

__all__ = ["Asker", "answers"]

# What a process needs for compiling a model and for asking all questions once, in what one retained
# token more takes it.  Rough, measured with examples/tiny_vlm: only shares depend on them.
_COMPILING, _ASKING = 1000, 20

Task = tuple[int, tuple[Choice, ...]]  # a layer, and choices of one number of tokens


class Asker:
    """A model and the prompts that the command line asks for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.jobs > 1:
            torch.set_num_threads(1)
        self.questions = load(arguments.questions, arguments.pictures)
        model, processor = load_model(str(arguments.model))
        encode_once(model)
        prompts = [
            Batch(batch.numbers, to_model(batch.inputs, model))
            for batch in batches(self.questions, processor, arguments.batch)
        ]
        self._ask = (model, processor, prompts, arguments.max_new_tokens)
        self._selectors = arguments.selectors
        retained = [r for r in (*arguments.retain, *arguments.retain_elsewhere) if r > 0]
        self._fewest = min(retained, default=0)
        self._pruned: tuple[object, PrunedModel] | None = None

    def full(self) -> Answers:
        """Answers of the unpruned model."""
        return answer(*self._ask)

    @functools.cached_property
    def vision_tokens(self) -> int:
        """Vision tokens of each prompt."""
        return vision_tokens(self._ask[0], self._ask[2][0])

    def pruned(self, task: Task) -> list[Answers]:
        """Answers with each choice.  The model compiled last is kept: most tasks can go on with it.

        Where all or none are kept that is another graph: nothing is pruned, or caches that hold a
        window of tokens may not be full.
        """
        (layer, choices), kind = task, _kind(task, self.vision_tokens)
        if self._pruned is None or self._pruned[0] != kind:
            self._pruned = None  # so that what it remembers is freed first
            fewest = self._fewest if kind[1] == "some" else choices[0].retain
            self._pruned = kind, PrunedModel(self._ask[0], layer, fewest, self._selectors)
        return [self._pruned[1].answer(*self._ask[1:], choice) for choice in choices]


def _kind(task: Task, vision_tokens: int) -> tuple[int, object]:
    """What tasks that can share a compiled model have in common."""
    layer, choices = task
    retain = choices[0].retain
    return layer, "some" if 0 < retain < vision_tokens else retain


def answers(
    asker: Asker, arguments: argparse.Namespace, plan: Sequence[Task]
) -> Iterator[list[Answers]]:
    """What ``asker.pruned`` gives for each task, in order, by ``arguments.jobs`` processes."""
    if arguments.jobs == 1:
        yield from map(asker.pruned, plan)
        return
    shares = _shares(plan, asker.vision_tokens, arguments.jobs)
    with contextlib.ExitStack() as stack:
        # Fresh processes: one that is forked inherits torch's threads in whatever state they are.
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _begin, (arguments,)))
            for _ in range(max(shares) + 1)
        ]
        made = [pools[n].submit(_work, task) for n, task in zip(shares, plan, strict=True)]
        try:
            for future in made:
                yield future.result()
        finally:
            for future in made:
                future.cancel()  # else leaving the pools would wait for all that is left


def _shares(plan: Sequence[Task], vision_tokens: int, jobs: int) -> list[int]:
    """Which process does each task: one model is compiled by one process alone.

    The largest shares go first, each to the process with the least so far.
    """
    kinds = [_kind(task, vision_tokens) for task in plan]
    costs = dict.fromkeys(kinds, _COMPILING)
    for kind, (_, choices) in zip(kinds, plan, strict=True):
        costs[kind] += sum(_ASKING + choice.retain for choice in choices)
    loads, process = [0] * jobs, {}
    for kind in sorted(costs, key=costs.__getitem__, reverse=True):
        process[kind] = loads.index(min(loads))
        loads[process[kind]] += costs[kind]
    return [process[kind] for kind in kinds]


_asker: Asker  # of a worker process


def _begin(arguments: argparse.Namespace) -> None:
    global _asker
    _asker = Asker(arguments)


def _work(task: Task) -> list[Answers]:
    return _asker.pruned(task)
