"""What a model answers, unpruned and pruned by the backend."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.evaluate.questions import Batch
from dartfx.passes.facts import Pruned

__all__ = ["Answers", "Setting", "answer", "answer_pruned", "vision_tokens"]


@dataclass(frozen=True)
class Setting:
    """One way to prune: the options of these names."""

    layer: int
    selector: str
    retain: int


@dataclass(frozen=True)
class Answers:
    """texts: one for each question.  first: [questions, vocabulary] float32, log-probabilities of
    the first token of each."""

    texts: tuple[str, ...]
    first: Tensor


@torch.no_grad()
def answer(model: Any, processor: Any, batches: Sequence[Batch], most: int) -> Answers:
    """Greedy answers of at most ``most`` tokens, in the order of the questions."""
    texts: dict[int, str] = {}
    first: dict[int, Tensor] = {}
    for batch in batches:
        inputs = _to(batch.inputs, model)
        made = model.generate(
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = made.sequences[:, inputs["input_ids"].shape[1] :]
        told = processor.batch_decode(new, skip_special_tokens=True)
        logits = made.logits[0].float().log_softmax(-1).cpu()
        texts.update(zip(batch.numbers, told, strict=False))
        first.update(zip(batch.numbers, logits, strict=False))
    order = sorted(texts)
    return Answers(tuple(texts[i].strip() for i in order), torch.stack([first[i] for i in order]))


def answer_pruned(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    most: int,
    setting: Setting,
    seeds: Sequence[int] = (0,),
) -> Iterator[Answers]:
    """The same of the model compiled by dartfx, once a seed; ``model`` itself stays as it is.

    The rewritten graph is run eagerly: compiling it would take longer than running it.  Raises
    UnsupportedModelError where the model cannot be pruned.
    """
    torch.compiler.reset()
    dartfx.reset()
    pruned = _twin(model)
    dartfx.compile(
        pruned,
        retain_tokens=setting.retain,
        layer=setting.layer,
        selector=setting.selector,
        lowering="eager",
        on_unsupported="error",
    )
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            answers = answer(pruned, processor, batches, most)
        yield answers


def vision_tokens(model: Any, batch: Batch) -> int:
    """Vision tokens of each prompt of the batch, as dartfx counts them.

    Raises ValueError when there are none to prune.
    """
    told = dartfx.explain(
        _twin(model).generate,
        **_to(batch.inputs, model),
        max_new_tokens=1,
        do_sample=False,
        options={"retain_tokens": 0},
    )
    for report in told.reports:
        if isinstance(report.outcome, Pruned):
            return int(report.outcome.vision_tokens)
    raise ValueError(f"dartfx finds no vision token to prune:\n{told}")


def _twin(model: Any) -> Any:
    """A copy of the module tree that shares every parameter and buffer with ``model``."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _to(inputs: dict[str, Tensor], model: Any) -> dict[str, Any]:
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
