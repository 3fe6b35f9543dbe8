"""A model's answers, unpruned and pruned by the backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.evaluate.questions import Batch
from dartfx.tools.evaluate.resume import Resumed, resuming
from dartfx.tools.evaluate.switch import name_for, selecting

__all__ = [
    "CALIBRATED",
    "MERGED",
    "Answers",
    "Choice",
    "PrunedModel",
    "answer",
    "encode_once",
    "vision_tokens",
]


MERGED, CALIBRATED = "+merge", "+calibrate"


@dataclass(frozen=True)
class Choice:
    """What is kept at a cut: the number of tokens, the selector and its seed.

    selector: a name, with "+merge" to merge dropped tokens, "+calibrate" to calibrate attention, or
    both in this order, or "downsampled".
    """

    selector: str
    retain: int
    seed: int

    @property
    def merges(self) -> bool:
        """Whether dropped tokens are averaged into the kept ones."""
        return MERGED in self.selector

    @property
    def calibrates(self) -> bool:
        """Whether attention is calibrated."""
        return self.selector.endswith(CALIBRATED)

    @property
    def name(self) -> str:
        """The selector's name in the registry."""
        return self.selector.removesuffix(CALIBRATED).removesuffix(MERGED)


@dataclass(frozen=True)
class Answers:
    """texts: one per question.  first: [questions, vocabulary] float32, log-probabilities of each
    answer's first token.  tokens: vision tokens of a prompt, if not the requested number.
    """

    texts: tuple[str, ...]
    first: Tensor
    tokens: float | None = None


@torch.no_grad()
def answer(model: Any, processor: Any, batches: Iterable[Batch], most: int) -> Answers:
    """Return greedy answers of at most ``most`` tokens, in the order of the questions."""
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
        decoded = processor.batch_decode(new, skip_special_tokens=True)
        logits = made.logits[0].float().log_softmax(-1).cpu()
        texts.update(zip(batch.numbers, decoded, strict=False))
        first.update(zip(batch.numbers, logits, strict=False))
    order = sorted(texts)
    return Answers(tuple(texts[i].strip() for i in order), torch.stack([first[i] for i in order]))


class PrunedModel:
    """A copy of the model compiled by dartfx to prune before one layer; ``model`` is unchanged.

    selectors: all that will be used.  retain: the number of tokens to compile with; if it drops
    some, any other number that drops some may be used later.  merge: average dropped tokens into
    the kept ones.  calibrate: the option of that name.

    The rewritten graph runs eagerly: compiling it would take longer than running it, and the
    selector is thus looked up in every call.  Raises UnsupportedModelError on the first call if
    the model cannot be pruned.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        retain: int,
        selectors: Collection[str],
        merge: bool = False,
        calibrate: bool = False,
    ) -> None:
        self._halves: list[Resumed] = []
        self._model = dartfx.compile(
            _twin(model),
            dynamic=True,  # the prompts' lengths differ
            retain_tokens=retain,
            layer=layer,
            selector=name_for(selectors),
            merge="nearest" if merge else "none",
            calibrate=calibrate,
            lowering="eager",
            on_unsupported="error",
        )

    def answer(
        self, processor: Any, batches: Sequence[Batch], most: int, choice: Choice
    ) -> Answers:
        """As :func:`answer`, pruned."""
        with (
            resuming(self._halves, choice.retain),
            torch.random.fork_rng(),
            selecting(choice.name),
        ):
            torch.manual_seed(choice.seed)
            return answer(self._model, processor, batches, most)


def encode_once(model: Any) -> None:
    """Cache image features by pixel tensor in the model, and in copies made later.

    ``generate`` computes image features before the decoder's graph, so they do not depend on what
    is dropped there.  A model without that method computes them every time.
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
        if id(pixels) not in known:  # the tensor is kept as well, so its id is not reused
            known[id(pixels)] = pixels, encode(**kwargs)
        return known[id(pixels)][1]

    base.get_image_features = features


def vision_tokens(model: Any, batch: Batch) -> int:
    """The vision tokens per prompt of the batch, as counted by dartfx.

    Raises ValueError if there are none to prune.
    """
    inputs: dict[str, Any] = dict(batch.inputs)
    explanation = dartfx.explain(
        _twin(model).generate,
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        options={"retain_tokens": 0},
    )
    for report in explanation.reports:
        if isinstance(report.outcome, Pruned):
            return int(report.outcome.vision_tokens)
    raise ValueError(f"dartfx finds no vision token to prune:\n{explanation}")


def _twin(model: Any) -> Any:
    """A copy of the module tree that shares every parameter and buffer with ``model``."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
