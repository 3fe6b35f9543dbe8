"""Runs the model on its prompts, in this process or in several."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

import dartfx
from dartfx.integrations.hf import load_model, prompt_inputs, to_model
from dartfx.model.tower import is_needed
from dartfx.tools.evaluate.answers import (
    Answers,
    Choice,
    PrunedModel,
    answer,
    encode_once,
    vision_tokens,
)
from dartfx.tools.evaluate.downsample import DOWNSAMPLED, any_grid, smaller_inputs, vision_tokens_of
from dartfx.tools.evaluate.questions import Batch, batches, load

__all__ = ["Asker", "answers"]

# Costs of compiling a model and of answering all questions once, in units of one more retained
# token.  Rough, measured with examples/tiny_vlm: only the division of work depends on them.
_COMPILING, _ASKING = 1000, 20

Task = tuple[int, tuple[Choice, ...]]  # a layer, and choices of one number of tokens


class Asker:
    """The model and prompts requested on the command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.jobs > 1:
            torch.set_num_threads(1)
        self.questions = load(arguments.questions, arguments.pictures)
        model, processor = load_model(str(arguments.model), dtype=arguments.dtype)
        encode_once(model)
        prompts = [
            Batch(batch.numbers, to_model(batch.inputs, model))
            for batch in batches(
                self.questions, functools.partial(prompt_inputs, processor), arguments.batch
            )
        ]
        self._ask = (model, processor, prompts, arguments.max_new_tokens)
        self._batch = arguments.batch
        names = [Choice(name, 0, 0).name for name in arguments.selectors]
        self._selectors = [name for name in dict.fromkeys(names) if name != DOWNSAMPLED]
        retained = [r for r in (*arguments.retain, *arguments.retain_elsewhere) if r > 0]
        self._fewest = min(retained, default=0)
        self._pruned: tuple[object, dict[object, PrunedModel]] = None, {}
        self._smaller: dict[int, Answers] = {}

    def full(self) -> Answers:
        """The unpruned model's answers."""
        return answer(*self._ask)

    @functools.cached_property
    def vision_tokens(self) -> int:
        """The vision tokens per prompt."""
        return vision_tokens(self._ask[0], self._ask[2][0])

    def pruned(self, task: Task) -> list[Answers]:
        """Answers with each choice.  Caches the last compiled models, which most tasks can reuse.

        Keeping all or no tokens needs another graph: nothing is pruned, or caches that hold a
        window of tokens may not be full.
        """
        kind = _kind(task, self.vision_tokens)
        if self._pruned[0] != kind:
            self._pruned = kind, {}  # to free what they cache first
            torch.compiler.reset()
            dartfx.reset()
        return [self._answers(task[0], choice, kind[1] == "some") for choice in task[1]]

    def _answers(self, layer: int, choice: Choice, some: bool) -> Answers:
        if choice.selector == DOWNSAMPLED:
            return self._downsampled(choice.retain)
        models, looks = self._pruned[1], is_needed(choice.name)
        how = choice.merges, choice.calibrates
        if (looks, how) not in models:
            retain = self._fewest if some else choice.retain
            alike = [name for name in self._selectors if is_needed(name) == looks]
            models[looks, how] = PrunedModel(self._ask[0], layer, retain, alike, *how)
        return models[looks, how].answer(*self._ask[1:], choice)

    def _downsampled(self, tokens: int) -> Answers:
        """The unpruned model's answers on images of about ``tokens`` tokens."""
        if tokens not in self._smaller:
            model, processor, _, most = self._ask
            make = functools.partial(
                smaller_inputs, processor, tokens=tokens, of=self.vision_tokens
            )
            prompts = [
                Batch(batch.numbers, to_model(batch.inputs, model))
                for batch in batches(self.questions, make, self._batch)
            ]
            with any_grid(model):
                answers = answer(model, processor, prompts, most)
            mean = vision_tokens_of(processor, prompts)
            self._smaller[tokens] = dataclasses.replace(answers, tokens=mean)
        return self._smaller[tokens]


def _kind(task: Task, vision_tokens: int) -> tuple[int, object]:
    """A key that is equal for tasks that can share a compiled model."""
    layer, choices = task
    retain = choices[0].retain
    return layer, "some" if 0 < retain < vision_tokens else retain


def answers(
    asker: Asker, arguments: argparse.Namespace, plan: Sequence[Task]
) -> Iterator[list[Answers]]:
    """Run ``asker.pruned`` on each task in ``arguments.jobs`` processes; results in order."""
    if arguments.jobs == 1:
        yield from map(asker.pruned, plan)
        return
    shares = _shares(plan, asker.vision_tokens, arguments.jobs)
    with contextlib.ExitStack() as stack:
        # Spawn: a forked process would inherit torch's threads in an arbitrary state.
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
                future.cancel()  # else closing the pools would wait for the remaining tasks


def _shares(plan: Sequence[Task], vision_tokens: int, jobs: int) -> list[int]:
    """Assign tasks to processes, such that only one process compiles each model.

    The largest shares are assigned first, each to the process with the least work so far.
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


_asker: Asker  # in a worker process


def _begin(arguments: argparse.Namespace) -> None:
    global _asker
    _asker = Asker(arguments)


def _work(task: Task) -> list[Answers]:
    return _asker.pruned(task)
