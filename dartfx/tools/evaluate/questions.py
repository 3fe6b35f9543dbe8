"""Reads evaluation questions from a file and converts them to model inputs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import InputError
from dartfx.integrations.hf import read_image

__all__ = ["Batch", "Question", "batches", "load"]


Make = Callable[[Any, str], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """An image, a question, its correct answer, and its type."""

    image: Path
    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Batch:
    """Prompts of one shape: the indices of their questions, and the model's arguments.

    A batch of one question holds it twice: a size of 1 would trigger another compilation.
    """

    numbers: tuple[int, ...]
    inputs: dict[str, Tensor]


def load(path: Path, pictures: int | None = None) -> list[Question]:
    """Read the questions of a JSON Lines file, only those on the first ``pictures`` if given.

    Each line is an object with "image" (a path relative to the file), "type", "question" and
    "answer".  Raises InputError for any other line and for an unreadable file.
    """
    questions = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("questions", f"cannot read {str(path)!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            given = [entry[key] for key in ("image", "type", "question", "answer")]
        except (ValueError, TypeError, KeyError) as error:
            wanted = '{"image": ..., "type": ..., "question": ..., "answer": ...}'
            why = f"{path}, line {number}: not a question like {wanted}"
            raise InputError("questions", why) from error
        image, kind, text, answer = map(str, given)
        questions.append(Question(path.parent / image, kind, text, answer))
    some = list(dict.fromkeys(q.image for q in questions))[:pictures]
    return [q for q in questions if q.image in some]


def batches(questions: Sequence[Question], make: Make, size: int) -> list[Batch]:
    """Batch the prompts, ``size`` each, without padding: only equal shapes share a batch.

    make: makes a model's inputs from an image and a prompt.  Questions of one type are adjacent, so
    that a batch stops as soon as its answers end.  All are held in memory.  A short batch repeats
    its prompts: all batches have equally many rows, at least 2, since dynamo specialises on the
    number of images, and compiling takes longer than answering.
    """
    alike: dict[object, list[tuple[int, dict[str, Tensor]]]] = {}
    for number, inputs in enumerate(_inputs(questions, make)):
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        alike.setdefault(shapes, []).append((number, inputs))
    made = []
    rows = max(2, min(size, max(map(len, alike.values()), default=0)))
    for group in alike.values():
        group.sort(key=lambda numbered: questions[numbered[0]].type)
        for start in range(0, len(group), size):
            numbers, parts = zip(*group[start : start + size], strict=True)
            full = list(itertools.islice(itertools.cycle(parts), rows))
            inputs = {name: torch.cat([part[name] for part in full]) for name in full[0]}
            made.append(Batch(numbers, inputs))
    return made


def _inputs(questions: Sequence[Question], make: Make) -> Iterator[dict[str, Tensor]]:
    for question in questions:
        try:
            yield make(read_image(question.image), question.text)
        except InputError as error:
            raise InputError("questions", f"{question.image.name}: {error}") from error
