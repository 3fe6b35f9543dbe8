"""Scores answers: means by type of question, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dartfx.tools.evaluate.answers import Answers
from dartfx.tools.evaluate.questions import Question

__all__ = ["MEAN", "METRICS", "Figure", "Sample", "chance", "score"]

MEAN = "mean"  # over types, with equal weights
METRICS = ("accuracy", "agreement", "kl")
_DRAWS = 2000


@dataclass(frozen=True)
class Figure:
    """A mean and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Sample:
    """The statistical sample: images, each with questions of some types.

    Intervals are bootstrap percentiles over images, not over questions: the questions on one image
    share what was seen and what was dropped.  All figures use the same draws, so the interval of a
    difference is computed from paired differences.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        pictures = {image: i for i, image in enumerate(dict.fromkeys(q.image for q in questions))}
        self.types = tuple(dict.fromkeys(q.type for q in questions))
        self.pictures = len(pictures)
        self._picture = torch.tensor([pictures[q.image] for q in questions])
        self._type = torch.tensor([self.types.index(q.type) for q in questions])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.pictures, (_DRAWS, self.pictures), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        self._draws = torch.zeros_like(ones).scatter_add_(1, drawn, ones)

    def figures(self, values: Tensor) -> dict[str, Figure]:
        """Means per type and overall of one value per question, [questions]."""
        sums, counts = self._by_picture(values), self._by_picture(torch.ones_like(values))
        means = torch.cat([sums.sum(0) / counts.sum(0), (sums.sum(0) / counts.sum(0)).mean()[None]])
        draws = (self._draws @ sums) / (self._draws @ counts)
        # A type with few questions may be absent from a draw.
        draws = torch.cat([draws, draws.nanmean(1, keepdim=True)], 1)
        ends = draws.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        rows = torch.stack([means, *ends], 1).tolist()
        return {n: Figure(*row) for n, row in zip((*self.types, MEAN), rows, strict=True)}

    def _by_picture(self, values: Tensor) -> Tensor:
        """Sum [questions] to [pictures, types]."""
        sums = torch.zeros(self.pictures, len(self.types), dtype=torch.float64)
        return sums.index_put_((self._picture, self._type), values.double(), accumulate=True)


def score(questions: Sequence[Question], full: Answers, pruned: Answers) -> dict[str, Tensor]:
    """Compute each metric per question, [questions] float64.

    accuracy: whether the answer is correct; agreement: whether it is exactly the unpruned model's;
    kl: Kullback-Leibler divergence in nats of the first answer token's distribution from the
    unpruned model's.
    """
    right = [_same(text, q.answer) for text, q in zip(pruned.texts, questions, strict=True)]
    agree = [a == b for a, b in zip(pruned.texts, full.texts, strict=True)]
    terms = full.first.double().exp() * (full.first.double() - pruned.first.double())
    return {
        "accuracy": torch.tensor(right, dtype=torch.float64),
        "agreement": torch.tensor(agree, dtype=torch.float64),
        "kl": terms.nan_to_num(0).sum(-1).clamp(min=0),  # 0 * -inf is NaN
    }


def chance(questions: Sequence[Question]) -> dict[str, float]:
    """Accuracy of always giving each type's most common answer, and the mean."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.type, Counter())[question.answer] += 1
    shares = {kind: max(c.values()) / c.total() for kind, c in answers.items()}
    return with_mean(shares)


def with_mean(shares: Mapping[str, float]) -> dict[str, float]:
    """Add the mean of the values under MEAN."""
    return {**shares, MEAN: sum(shares.values()) / len(shares)}


def _same(given: str, right: str) -> bool:
    return given.strip().casefold() == right.strip().casefold()
