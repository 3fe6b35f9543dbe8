"""What a model answers, unpruned and pruned by the backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.evaluate.questions import Batch
from dartfx.evaluate.resume import resuming
from dartfx.evaluate.switch import name_for, selecting
from dartfx.passes.facts import Pruned

__all__ = ["Answers", "Cut", "answer", "answer_pruned", "encode_once", "vision_tokens"]


@dataclass(frozen=True)
class Cut:
    """Where to prune and to how many tokens: the options of these names."""

    layer: int
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
        inputs = batch.inputs
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
    cut: Cut,
    draws: Sequence[tuple[str, int]],
) -> Iterator[Answers]:
    """The same of the model compiled by dartfx; ``model`` itself stays as it is.

    draws: selectors, each with a seed; one result for each.  The rewritten graph is run eagerly:
    compiling it would take longer than running it, and all selectors then share one graph, which
    looks them up in every call and computes what comes before them once.  Raises
    UnsupportedModelError where the model cannot be pruned.
    """
    torch.compiler.reset()
    dartfx.reset()
    pruned = _twin(model)
    dartfx.compile(
        pruned,
        dynamic=True,  # the prompts' lengths differ
        retain_tokens=cut.retain,
        layer=cut.layer,
        selector=name_for({name for name, _ in draws}),
        lowering="eager",
        on_unsupported="error",
    )
    with resuming():
        for name, seed in draws:
            with torch.random.fork_rng(), selecting(name):
                torch.manual_seed(seed)
                answers = answer(pruned, processor, batches, most)
            yield answers


def encode_once(model: Any) -> None:
    """Let the model, and copies made later, remember what it makes of each tensor of pixels.

    ``generate`` calls for image features before the decoder's graph, so that they are the same
    whatever is dropped there.  A model without that call computes them anew every time.
    """
    base = getattr(model, "base_model", model)
    if not hasattr(base, "get_image_features"):
        return
    encode: Callable[..., Any] = base.get_image_features
    known: dict[int, tuple[Any, Any]] = {}

    @wraps(encode)
    def features(*args: Any, **kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values")
        if torch.compiler.is_compiling() or args or pixels is None:
            return encode(*args, **kwargs)
        if id(pixels) not in known:  # the tensor is kept beside, so its id is not used again
            known[id(pixels)] = pixels, encode(**kwargs)
        return known[id(pixels)][1]

    base.get_image_features = features


def vision_tokens(model: Any, batch: Batch) -> int:
    """Vision tokens of each prompt of the batch, as dartfx counts them.

    Raises ValueError when there are none to prune.
    """
    inputs: dict[str, Any] = dict(batch.inputs)
    told = dartfx.explain(
        _twin(model).generate,
        **inputs,
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
