"""The first part of ``make demo``: a small trained model, with all vision tokens and with few.

The model is the one in tiny_vlm/, the pictures are those it never saw, and the questions are asked
in the order of their file, so nobody chose them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

import dartfx
from dartfx.tools.evaluate.answers import answer
from dartfx.tools.evaluate.questions import Question, batches, load
from dartfx.tools.evaluate.scores import MEAN, chance
from dartfx.tools.evaluate.work import load_model

__all__ = ["Verdict", "show"]

TINY = Path(__file__).parent / "tiny_vlm"
MOST = 8  # tokens of an answer
SIDE = 672  # of the picture beside the overlay, in pixels


@dataclass(frozen=True)
class Verdict:
    """A question, its number from 1, and what was said with all vision tokens and with few."""

    number: int
    asked: Question
    full: str
    pruned: str

    @property
    def right(self) -> tuple[bool, bool]:
        """Whether each is the right answer, to the letter."""
        return self.full == self.asked.answer, self.pruned == self.asked.answer


def show(number: int, retain: int, layer: int, out: Path) -> None:
    """Print how many answers are right with all tokens and with ``retain``, and draw one picture.

    number: how many of the held-out questions are asked.  out: the PNG file.  Raises ValueError
    when nothing is pruned: ``retain`` is not below the number of vision tokens.
    """
    logging.disable_progress_bar()
    model, processor = load_model(str(TINY / "model"))
    pruned = dartfx.compile(
        copy.deepcopy(model),
        retain_tokens=retain,
        layer=layer,
        lowering="eager",  # compiling so small a model takes longer than running it
        on_unsupported="error",
        tokens=True,
    )
    asked = load(TINY / "heldout" / "questions.jsonl")[:number]
    prompts = batches(asked, processor, 8)
    print(f"asking {len(asked)} questions with all vision tokens and with {retain} ...", flush=True)
    told = [answer(each, processor, prompts, MOST).texts for each in (model, pruned)]
    verdicts = [Verdict(i, *each) for i, each in enumerate(zip(asked, *told, strict=True), 1)]
    both = next((v for v in verdicts if v.right == (True, True)), None)
    lost = next((v for v in verdicts if v.right == (True, False)), None)
    drawn = both or lost or verdicts[0]
    try:
        total = _draw(pruned, processor, drawn.asked, out)
    except dartfx.DartfxError as error:
        raise ValueError(f"nothing was pruned with {retain} tokens to keep: {error}") from error
    _score(verdicts, total, retain)
    _tell("the first of them that both answer right", both, total, retain)
    _tell("the first of them that pruning got wrong", lost, total, retain)
    print(f"\n{out}: the picture of question {drawn.number}, and what was kept of it:")
    print(f"  {retain} of {total} patches, coloured by the pivot that kept them; dark: dropped")
    torch.compiler.reset()  # what was compiled for this model counts against the next one's limit
    dartfx.reset()


def _score(verdicts: Sequence[Verdict], total: int, retain: int) -> None:
    pictures = len({v.asked.image for v in verdicts})
    of = len(verdicts)
    guess = chance([v.asked for v in verdicts])[MEAN]
    print(f"the first {of} held-out questions, on {pictures} pictures; whole answer right:")
    for told, right in (
        (f"all {total} vision tokens", sum(v.right[0] for v in verdicts)),
        (f"{retain} of them, by DART", sum(v.right[1] for v in verdicts)),
    ):
        print(f"  {told:<24} {right:>3} of {of}  {right / of:.0%}")
    print(f"  (always the commonest answer of a type: {guess:.0%}, mean of types)")


def _tell(what: str, verdict: Verdict | None, total: int, retain: int) -> None:
    if verdict is None:
        print(f"\n{what}: none")
        return
    asked = verdict.asked
    print(f"\n{what}: question {verdict.number}, picture {asked.image.name}")
    for name, text in (
        ("question", asked.text),
        ("answer", asked.answer),
        (f"{total} tokens", verdict.full),
        (f"{retain} tokens", verdict.pruned),
    ):
        print(f"  {name:<11} {text}")


def _draw(pruned: Any, processor: Any, asked: Question, out: Path) -> int:
    """Picture and overlay side by side; how many vision tokens there are."""
    (prompt,) = batches([asked], processor, 1)
    pruned.generate(**prompt.inputs, max_new_tokens=1, do_sample=False)
    kept = dartfx.kept_tokens()[0]  # a single prompt stands twice in its batch
    image = Image.open(asked.image).convert("RGB")
    sheet = Image.new("RGB", (2 * SIDE + 8, SIDE), "white")
    sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, 0))
    sheet.paste(dartfx.overlay(image, kept).resize((SIDE, SIDE)), (SIDE + 8, 0))
    sheet.save(out)
    return len(kept.positions)
