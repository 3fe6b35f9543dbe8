"""Accumulates the figures of all settings, and renders them as JSON and Markdown tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.errors import InputError
from dartfx.tools.evaluate.questions import Question
from dartfx.tools.evaluate.scores import MEAN, METRICS, Figure, Sample, chance

__all__ = ["Results", "as_lines"]

Key = tuple[int, str, int]  # layer, selector, retained

SEES_NOTHING = 0.10  # accuracy above chance allowed without any vision token

_TITLES = {
    "accuracy": "Accuracy, %",
    "agreement": "Exactly the unpruned answer, %",
    "kl": "KL divergence of the first answer token, nats",
}


@dataclass
class Results:
    """Figures of each setting; seeds of one setting are averaged question by question.

    vision_tokens: per prompt.  full: accuracy of the unpruned model, [questions].  values: by
    layer, selector and retained tokens, the metrics of each seed, [questions].  tokens: the actual
    number where an image could not be resized to the requested one.  earlier: settings from
    earlier runs, as in JSON; made_before: what they were made with.
    """

    questions: Sequence[Question]
    vision_tokens: int
    full: Tensor
    values: dict[Key, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    tokens: dict[Key, float] = field(default_factory=dict)
    earlier: dict[Key, dict[str, Any]] = field(default_factory=dict)
    made_before: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sample = Sample(self.questions)

    def add(self, key: Key, seed: int, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one setting and seed, [questions] each."""
        self.values.setdefault(key, {})[seed] = metrics

    @classmethod
    def of_json(cls, questions: Sequence[Question], entries: Sequence[dict[str, Any]]) -> Results:
        """Combine earlier results on these questions; the last of duplicate settings counts.

        entries: from :meth:`as_json`.  Raises InputError if they are for other questions or another
        model, or if none has a setting that keeps all tokens.
        """
        entry = entries[0]
        total = entry["vision_tokens"]
        settings = {
            (each["layer"], each["selector"], each["retained"]): each
            for one in entries
            for each in one["settings"]
        }
        whole = (each for (_, _, kept), each in settings.items() if kept == total)
        full = [each["right_by_seed"]["0"] for each in whole]
        if not full:
            raise InputError("from", f"no file has a setting that keeps all {total} vision tokens")
        made = cls(questions, total, _from_bits(full[0], len(questions)))
        made.earlier = settings
        made.tokens = {k: e["vision_tokens"] for k, e in settings.items() if "vision_tokens" in e}
        mine = made.as_json()
        for one in entries:
            for name in ("pictures", "questions", "vision_tokens", "unpruned"):
                if one[name] != mine[name]:
                    raise InputError("from", f"{name} differ: {one[name]} and {mine[name]}")
            before = one["made_with"]
            made.made_before += before if isinstance(before, list) else [before]
        return made

    def settings(self) -> list[Key]:
        """All settings, earlier ones first."""
        return [*self.earlier, *self.values]

    def mean(self, key: Key, metric: str) -> Tensor:
        """A metric's mean over seeds, [questions]; only accuracy for earlier settings."""
        if key in self.earlier:
            bits = self.earlier[key]["right_by_seed"].values()
            return torch.stack([_from_bits(each, len(self.questions)) for each in bits]).mean(0)
        return torch.stack([metrics[metric] for metrics in self.values[key].values()]).mean(0)

    def figures(self, key: Key, metric: str) -> dict[str, Figure]:
        """A metric by type."""
        if key in self.earlier:
            return {kind: Figure(*ends) for kind, ends in self.earlier[key][metric].items()}
        return self.sample.figures(self.mean(key, metric))

    def differences(self, key: Key, selector: str) -> dict[str, Figure]:
        """Accuracy of ``selector`` minus that of ``key`` at the same layer and retained tokens."""
        other = (key[0], selector, key[2])
        return self.sample.figures(self.mean(other, "accuracy") - self.mean(key, "accuracy"))

    def void(self) -> list[Key]:
        """The settings without vision tokens that answer better than chance.

        At their layers the answers were determined before the cut, whatever is dropped there.
        """
        bound = chance(self.questions)[MEAN] + SEES_NOTHING
        none = [key for key in self.settings() if key[2] == 0]
        return [key for key in none if self.figures(key, "accuracy")[MEAN].value > bound]

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for :func:`as_lines`."""
        kinds = [q.type for q in self.questions]
        return {
            "made_with": [*self.made_before, _made_with()] if self.values else self.made_before,
            "pictures": self.sample.pictures,
            "questions": {kind: kinds.count(kind) for kind in self.sample.types},
            "vision_tokens": self.vision_tokens,
            "chance": chance(self.questions),
            "unpruned": _as_json(self.sample.figures(self.full)),
            "void_layers": [key[0] for key in self.void()],
            "settings": [
                *self.earlier.values(),
                *(self._setting_as_json(key) for key in self.values),
            ],
        }

    def _setting_as_json(self, key: Key) -> dict[str, Any]:
        layer, selector, retain = key
        right = {seed: _bits(m["accuracy"]) for seed, m in self.values[key].items()}
        figures = {metric: _as_json(self.figures(key, metric)) for metric in METRICS}
        entry = {"layer": layer, "selector": selector, "retained": retain}
        entry |= {"vision_tokens": self.tokens[key]} if key in self.tokens else {}
        return entry | figures | {"right_by_seed": right}

    def as_markdown(self) -> str:
        """Tables of each metric per layer, then each selector compared with the first."""
        parts = [self._without_vision()]
        settings = self.settings()
        for layer in dict.fromkeys(key[0] for key in settings):
            keys = sorted((k for k in settings if k[0] == layer), key=lambda k: -k[2])
            for metric in METRICS:
                parts.append(self._table(layer, keys, metric))
            first = keys[0][1]
            pairs = [k for k in keys if k[1] != first and (layer, first, k[2]) in keys]
            if pairs:
                title = f"Accuracy of {first} less that of the others, layer {layer}, points"
                rows = [self._row(k, self.differences(k, first), 100, "+.1f") for k in pairs]
                parts.append(self._lines(title, rows))
        return "\n\n".join(parts) + "\n"

    def _without_vision(self) -> str:
        share = {kind: f"{100 * value:.1f}" for kind, value in chance(self.questions).items()}
        rows = [["commonest answer", "", *share.values()]]
        void = self.void()
        for key in (k for k in self.settings() if k[2] == 0):
            name = f"layer {key[0]}" + (": void" if key in void else "")
            rows += [[name, "0", *_cells(self.figures(key, "accuracy"), 100, ".1f")]]
        text = self._lines("Accuracy with no vision token left, %", rows)
        if void:
            text += (
                "\n\nVoid: the answers were read off before that layer, so that a comparison of "
                "selectors there says nothing."
            )
        return text

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
        return [name, f"{self.tokens.get(key, key[2]):.0f}", *_cells(figures, scale, form)]

    def _lines(self, title: str, rows: Sequence[Sequence[str]]) -> str:
        head = ["selector", "kept", *self.sample.types, MEAN]
        lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
        return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(figures: dict[str, Figure], scale: int, form: str) -> Iterator[str]:
    for figure in figures.values():
        half = scale * (figure.high - figure.low) / 2
        yield f"{scale * figure.value:{form}} ±{half:{form.lstrip('+')}}"


def _as_json(figures: dict[str, Figure]) -> dict[str, Any]:
    """Each figure as [value, low, high]."""
    return {
        kind: [round(value, 4) for value in astuple(figure)] for kind, figure in figures.items()
    }


def _bits(right: Tensor) -> str:
    """Pack each question's verdict as a bit, first is highest, zero-padded to hex digits."""
    bits = "".join(str(int(r)) for r in right.tolist())
    digits = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"


def _from_bits(digits: str, number: int) -> Tensor:
    """The inverse of :func:`_bits` for ``number`` verdicts: [number] float64."""
    bits = f"{int(digits, 16):0{4 * len(digits)}b}"[:number]
    return torch.tensor([float(bit) for bit in bits], dtype=torch.float64)


def as_lines(entry: dict[str, Any]) -> str:
    """Format JSON with one line per entry and one per setting."""
    entries = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items() if k != "settings"]
    settings = ",\n".join(map(json.dumps, entry["settings"]))
    return "{\n" + ",\n".join([*entries, f'"settings": [\n{settings}\n]']) + "\n}\n"


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
