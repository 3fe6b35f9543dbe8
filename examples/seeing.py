"""The first part of ``make demo``: a small trained model with all vision tokens and with few.

The model is that of tiny_vlm/, the images are held out, and the questions are taken in file order,
so they are not hand-picked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from progress import counting
from transformers.utils import logging

import dartfx
from dartfx.integrations.hf import load_model, prompt_inputs
from dartfx.tools.evaluate.answers import answer
from dartfx.tools.evaluate.questions import Batch, Question, batches, load
from dartfx.tools.evaluate.scores import MEAN, chance

__all__ = ["Verdict", "show"]

TINY = Path(__file__).parent / "tiny_vlm"
MOST = 8  # tokens of an answer
SIDE = 672  # of the image next to the overlay, in pixels


@dataclass(frozen=True)
class Verdict:
    """A question, its number from 1, and the answers with all vision tokens and with few."""

    number: int
    question: Question
    full: str
    pruned: str

    @property
    def right(self) -> tuple[bool, bool]:
        """Whether each answer is exactly correct."""
        return self.full == self.question.answer, self.pruned == self.question.answer


def _pruned(model: Any, retain: int, layer: int) -> Any:
    """A pruned copy of the model."""
    return dartfx.compile(
        copy.deepcopy(model),
        dynamic=True,  # the prompts' lengths differ, and every decode step's does
        retain_tokens=retain,
        layer=layer,
        lowering="eager",  # compiling so small a model takes longer than running it
        on_unsupported="error",
        tokens=True,
    )


def show(number: int, retain: int, layer: int, out: Path) -> None:
    """Print how many answers are correct with all tokens and with ``retain``; draw one image.

    number: of held-out questions to ask.  out: the PNG file.  Raises ValueError if nothing is
    pruned: ``retain`` is not below the number of vision tokens.
    """
    logging.disable_progress_bar()
    model, processor = load_model(str(TINY / "model"))
    pruned = _pruned(model, retain, layer)
    chosen = load(TINY / "heldout" / "questions.jsonl")[:number]
    prompts = batches(chosen, partial(prompt_inputs, processor), 8)
    print(
        f"asking {len(chosen)} questions with all vision tokens and with {retain} ...",
        flush=True,
    )
    with counting("asking", 2 * len(chosen), "question") as bar:

        def counted() -> Iterator[Batch]:
            for batch in prompts:
                yield batch
                bar.update(len(batch.numbers))

        answers = [answer(each, processor, counted(), MOST).texts for each in (model, pruned)]
    verdicts = [Verdict(i, *each) for i, each in enumerate(zip(chosen, *answers, strict=True), 1)]
    both = next((v for v in verdicts if v.right == (True, True)), None)
    lost = next((v for v in verdicts if v.right == (True, False)), None)
    drawn = both or lost or verdicts[0]
    try:
        total = _draw(pruned, prompts, drawn, out)
    except dartfx.DartfxError as error:
        raise ValueError(f"nothing was pruned with {retain} tokens to keep: {error}") from error
    _score(verdicts, total, retain)
    _print_example("the first of them that both answer right", both, total, retain)
    _print_example("the first of them that pruning got wrong", lost, total, retain)
    print(f"\n{out}: the picture of question {drawn.number}, and what was kept of it:")
    print(f"  {retain} of {total} patches, coloured by the pivot that kept them; dark: dropped")
    torch.compiler.reset()  # this model's compilations count against the next one's limit
    dartfx.reset()


def _score(verdicts: Sequence[Verdict], total: int, retain: int) -> None:
    pictures = len({v.question.image for v in verdicts})
    of = len(verdicts)
    guess = chance([v.question for v in verdicts])[MEAN]
    print(f"the first {of} held-out questions, on {pictures} pictures; whole answer right:")
    for label, right in (
        (f"all {total} vision tokens", sum(v.right[0] for v in verdicts)),
        (f"{retain} of them, by DART", sum(v.right[1] for v in verdicts)),
    ):
        print(f"  {label:<24} {right:>3} of {of}  {right / of:.0%}")
    print(f"  (always the commonest answer of a type: {guess:.0%}, mean of types)")


def _print_example(what: str, verdict: Verdict | None, total: int, retain: int) -> None:
    if verdict is None:
        print(f"\n{what}: none")
        return
    question = verdict.question
    print(f"\n{what}: question {verdict.number}, picture {question.image.name}")
    for name, text in (
        ("question", question.text),
        ("answer", question.answer),
        (f"{total} tokens", verdict.full),
        (f"{retain} tokens", verdict.pruned),
    ):
        print(f"  {name:<11} {text}")


def _draw(pruned: Any, prompts: Sequence[Batch], drawn: Verdict, out: Path) -> int:
    """Draw image and overlay side by side; returns the number of vision tokens."""
    # In the same batch as before: dynamo would recompile for another number of images.
    batch = next(b for b in prompts if drawn.number - 1 in b.numbers)
    pruned.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
    row = batch.numbers.index(drawn.number - 1)
    kept = next(k for k in dartfx.kept_tokens() if k.row == row)
    image = Image.open(drawn.question.image).convert("RGB")
    sheet = Image.new("RGB", (2 * SIDE + 8, SIDE), "white")
    sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, 0))
    sheet.paste(dartfx.overlay(image, kept).resize((SIDE, SIDE)), (SIDE + 8, 0))
    sheet.save(out)
    return len(kept.positions)
