"""Batched answers of a pruned Hugging Face vision-language model, shared by the adapters.

Answers must not depend on the batch size.  All rows of a batch drop the same number of tokens, so
only prompts with equally many vision tokens share a batch; text is padded on the left, which does
not change any row's selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.errors import ConfigError, UnsupportedGraphError
from dartfx.integrations.prompts import Batch, Conversation, Prompts
from dartfx.model.caches import kv_cache
from dartfx.observe import report
from dartfx.observe.report import Report
from dartfx.passes.outcome import Pruned, Unchanged

__all__ = ["Answer", "Answering", "Settings", "Tally"]


@dataclass(frozen=True)
class Settings:
    """Generation settings.

    sample: sample with temperature and top_p (None: the model's defaults); otherwise greedy.
    until: stop strings, which are not part of the answer.
    """

    max_new_tokens: int = 1024
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    beams: int = 1
    until: tuple[str, ...] = ()

    def as_arguments(self) -> dict[str, object]:
        """The arguments of ``generate``."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p}
        given = {k: v for k, v in drawn.items() if v is not None}
        # None overrides the sampling settings in the checkpoint's generation config.
        how = given if self.sample else {**dict.fromkeys(drawn), "top_k": None}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample,
            "num_beams": self.beams,
            **how,
        }

    def cut(self, text: str) -> str:
        """The text up to the first of ``until`` in it."""
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends)] if ends else text


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt, and the token counts of prompt and answer without padding."""

    text: str
    read: int
    written: int


@dataclass
class Tally:
    """Counts of prompts: all, those with images or videos, and those that were pruned.

    tokens, kept: sequence lengths of the pruned prompts before and after, with left padding.
    """

    prompts: int = 0
    with_vision: int = 0
    pruned: int = 0
    tokens: int = 0
    kept: int = 0
    reports: list[Report] = field(default_factory=list)

    @property
    def all_retained(self) -> bool:
        """Whether the options keep all vision tokens of some prompt."""
        outcomes = (made.outcome for made in self.reports)
        return any(isinstance(o, Unchanged) and o.all_retained for o in outcomes)

    def __str__(self) -> str:
        lines = [f"{self.pruned} of {self.with_vision} prompts with images or videos were pruned"]
        if self.pruned:
            before, after = self.tokens / self.pruned, self.kept / self.pruned
            lines.append(f"  their sequences: {before:.1f} -> {after:.1f} tokens on average")
        figures = dict.fromkeys(
            f"  vision tokens: {p.vision_tokens} per prompt, {p.retained} retained, dropped before "
            f"layer {', '.join(str(cut.layer) for cut in p.cuts)} (as compiled; a graph for all "
            "sizes serves others, too)"
            for made in self.reports
            if isinstance(p := made.outcome, Pruned)
        )
        unpruned = [f"  {made}" for made in self.reports if not made.pruned and _matters(made)]
        return "\n".join([*lines, *figures, *dict.fromkeys(unpruned)])


def _matters(made: Report) -> bool:
    outcome = made.outcome
    return not isinstance(outcome, Unchanged) or outcome.all_retained or outcome.unsure


class Answering:
    """Computes answers or losses for prompts in batches and counts what was pruned.

    model, processor: of Hugging Face.  options: those of :func:`dartfx.compile`, which compiles the
    model in place; None leaves it unpruned, for comparison.  ``on_unsupported`` defaults to
    "error": measuring a model that silently ran unpruned is worthless.  Raises ConfigError for an
    invalid option.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: Mapping[str, Any] | None,
        *,
        batch_size: int = 1,
        num_frames: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.model, self.tally = model, Tally()
        self._prompts = Prompts(processor, batch_size, num_frames)
        self._strict: str | None = None
        if options is not None:
            options = {"on_unsupported": "error", **options}
            self._strict = str(options["on_unsupported"])
            dartfx.compile(model, **options)

    def answer(
        self, conversations: Sequence[Conversation], settings: Sequence[Settings]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and answer; prompts with equal settings share batches.

        Raises UnsupportedGraphError where a prompt's vision tokens were not pruned.
        """
        for batch in self._prompts.batches(conversations, settings):
            how = settings[batch.numbers[0]]
            made = self._generate(batch, **how.as_arguments())
            ids = batch.inputs["input_ids"]
            new = made.sequences[:, ids.shape[1] :]
            read = batch.inputs.get("attention_mask", torch.ones_like(ids)).sum(1).tolist()
            written = zip(batch.numbers, new, self._prompts.decode(new), read, strict=True)
            for number, row, text, length in written:
                tokens = _without_pads(row, self._prompts.tokenizer.pad_token_id)
                yield number, Answer(how.cut(text), length, tokens)

    def losses(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield each prompt's index, its continuation's loss, and whether it is the greedy output.

        The loss is the mean negative log-likelihood of the continuation's tokens (nats).  They are
        fed one by one after the pruned prompt, as ``generate`` does, so the selection does not
        depend on the continuation.  Raises ValueError for a continuation that is empty or contains
        an end-of-text token, and whatever :meth:`answer` raises.
        """
        for batch in self._prompts.batches(conversations, [None] * len(continuations)):
            targets = [self._target(conversations[n], continuations[n]) for n in batch.numbers]
            for number, target, steps in zip(
                batch.numbers, targets, self._forced(batch, targets), strict=True
            ):
                wanted = torch.tensor(target, device=steps.device)
                loss = torch.nn.functional.cross_entropy(steps, wanted)
                yield number, (float(loss), bool((steps.argmax(-1) == wanted).all()))

    def _target(self, conversation: Conversation, continuation: str) -> list[int]:
        target = self._prompts.continuation(conversation, continuation)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if not target:
            raise ValueError(f"the continuation {continuation!r} has no token, so no likelihood")
        if any(token in ends for token in target[:-1]):
            raise ValueError(f"the continuation {continuation!r} has an end of text inside")
        return target

    def _forced(self, batch: Batch, targets: Sequence[list[int]]) -> list[Tensor]:
        """The float32 logits [T, V] that ``generate`` computes for each token of a row's target.

        Rows with shorter targets repeat their last token until the others end.
        """
        most = max(map(len, targets))
        forced = torch.tensor([target + target[-1:] * (most - len(target)) for target in targets])
        made = self._generate(
            batch,
            output_logits=True,
            logits_processor=[_force(forced.to(self.model.device), batch.inputs)],
            **Settings(max_new_tokens=most).as_arguments(),
        )
        steps = torch.stack(made.logits, 1).float()
        return [row[: len(target)] for row, target in zip(steps, targets, strict=True)]

    @torch.no_grad()
    def _generate(self, batch: Batch, **arguments: Any) -> Any:
        """Call ``generate`` and update the tally."""
        inputs = batch.inputs.to(device=self.model.device, dtype=self.model.dtype)
        before = report.latest()
        output = self.model.generate(**inputs, **arguments, return_dict_in_generate=True)
        self.tally.reports += report.since(before)
        rows, length = inputs["input_ids"].shape
        dropped = kv_cache.pruned_length(output.past_key_values)
        self.tally.prompts += rows
        self.tally.with_vision += rows * batch.sees
        if dropped:
            self.tally.pruned += rows
            self.tally.tokens += rows * length
            self.tally.kept += rows * (length - dropped)
        elif batch.sees and self._strict == "error" and not self.tally.all_retained:
            raise UnsupportedGraphError(_UNPRUNED)
        return output


_UNPRUNED = (
    "a prompt with images or videos ran unpruned, and no compilation said why: past dynamo's "
    "recompile_limit torch runs models eagerly. Raise torch._dynamo.config.recompile_limit, or "
    'accept it with on_unsupported="warn"'
)


def _without_pads(row: Tensor, pad: int | None) -> int:
    """The number of tokens in a row before its padding."""
    filled = (row != pad).nonzero() if pad is not None else row.nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0


def _force(targets: Tensor, inputs: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that forces the next token of ``targets`` [B, T]."""
    start = inputs["input_ids"].shape[1]

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        chosen = targets[:, ids.shape[1] - start, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)

    return process
