"""A measure while it grows: settings with their figures, as JSON and as Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.evaluate.answers import Setting
from dartfx.evaluate.questions import Question
from dartfx.evaluate.scores import MEAN, METRICS, Figure, Sample, chance

__all__ = ["Results"]

Key = tuple[int, str, int]  # layer, selector, retained

_TITLES = {
    "accuracy": "Accuracy, %",
    "agreement": "Exactly the unpruned answer, %",
    "kl": "KL divergence of the first answer token, nats",
}


@dataclass
class Results:
    """Figures of each setting; seeds of one setting are averaged question by question.

    vision_tokens: of each prompt.  full: accuracy of the unpruned model, [questions].  values: by
    layer, selector and retained tokens, the metrics of each seed, [questions].
    """

    questions: Sequence[Question]
    vision_tokens: int
    full: Tensor
    values: dict[Key, dict[int, dict[str, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sample = Sample(self.questions)

    def add(self, setting: Setting, seed: int, metrics: dict[str, Tensor]) -> None:
        """Takes in what one setting gave with one seed, [questions] each."""
        key = (setting.layer, setting.selector, setting.retain)
        self.values.setdefault(key, {})[seed] = metrics

    def mean(self, key: Key, metric: str) -> Tensor:
        """A metric's mean over seeds, [questions]."""
        return torch.stack([metrics[metric] for metrics in self.values[key].values()]).mean(0)

    def figures(self, key: Key, metric: str) -> dict[str, Figure]:
        """A metric by type."""
        return self.sample.figures(self.mean(key, metric))

    def differences(self, key: Key, selector: str) -> dict[str, Figure]:
        """Accuracy of ``selector`` less that of ``key`` at the same layer and retained tokens."""
        other = (key[0], selector, key[2])
        return self.sample.figures(self.mean(other, "accuracy") - self.mean(key, "accuracy"))

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for ``json.dump``."""
        kinds = [q.type for q in self.questions]
        return {
            "made_with": _made_with(),
            "pictures": self.sample.pictures,
            "questions": {kind: kinds.count(kind) for kind in self.sample.types},
            "vision_tokens": self.vision_tokens,
            "chance": chance(self.questions),
            "unpruned": _as_json(self.sample.figures(self.full)),
            "settings": [self._setting_as_json(key) for key in self.values],
        }

    def _setting_as_json(self, key: Key) -> dict[str, Any]:
        layer, selector, retain = key
        right = {
            seed: "".join(str(int(r)) for r in metrics["accuracy"].tolist())
            for seed, metrics in self.values[key].items()
        }
        figures = {metric: _as_json(self.figures(key, metric)) for metric in METRICS}
        told = {"layer": layer, "selector": selector, "retained": retain}
        return told | figures | {"right_by_seed": right}

    def as_markdown(self) -> str:
        """Tables of every metric for each layer, then each selector against the first."""
        parts = []
        for layer in dict.fromkeys(key[0] for key in self.values):
            keys = sorted((k for k in self.values if k[0] == layer), key=lambda k: -k[2])
            for metric in METRICS:
                parts.append(self._table(layer, keys, metric))
            first = keys[0][1]
            pairs = [k for k in keys if k[1] != first and (layer, first, k[2]) in self.values]
            if pairs:
                title = f"Accuracy of {first} less that of the others, layer {layer}, points"
                rows = [self._row(k, self.differences(k, first), 100, "+.1f") for k in pairs]
                parts.append(self._lines(title, rows))
        return "\n\n".join(parts) + "\n"

    def _table(self, layer: int, keys: Sequence[Key], metric: str) -> str:
        scale, form = (1, ".3f") if metric == "kl" else (100, ".1f")
        rows = []
        if metric == "accuracy":
            share = {kind: f"{100 * value:.1f}" for kind, value in chance(self.questions).items()}
            rows += [["commonest answer", "", *share.values()]]
            full = self.sample.figures(self.full)
            rows += [["unpruned", str(self.vision_tokens), *_cells(full, 100, ".1f")]]
        rows += [self._row(key, self.figures(key, metric), scale, form) for key in keys]
        return self._lines(f"{_TITLES[metric]}, pruned before layer {layer}", rows)

    def _row(self, key: Key, figures: dict[str, Figure], scale: int, form: str) -> list[str]:
        name = "none left" if key[2] == 0 else key[1]
        return [name, str(key[2]), *_cells(figures, scale, form)]

    def _lines(self, title: str, rows: Sequence[Sequence[str]]) -> str:
        head = ["selector", "kept", *self.sample.types, MEAN]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
        return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(figures: dict[str, Figure], scale: int, form: str) -> Iterator[str]:
    for figure in figures.values():
        half = scale * (figure.high - figure.low) / 2
        yield f"{scale * figure.value:{form}} ±{half:{form.lstrip('+')}}"


def _as_json(figures: dict[str, Figure]) -> dict[str, Any]:
    return {
        kind: {end: round(value, 5) for end, value in asdict(figure).items()}
        for kind, figure in figures.items()
    }


def _made_with() -> dict[str, str]:
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "dartfx": dartfx.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
    }
