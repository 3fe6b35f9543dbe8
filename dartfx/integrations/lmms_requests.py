"""Converts lmms-eval's requests to Hugging Face formats, without importing lmms-eval.

A request's arguments are a tuple whose order depends on the kinds of request and model
(``construct_requests`` in lmms-eval's api/task.py):

    messages:      context, doc_to_messages, generation arguments, document, task, split
    generate:      context, generation arguments, doc_to_visual,   document, task, split
    loglikelihood: context, continuation,         doc_to_visual,   document, task, split
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from dartfx.integrations.answering import Settings
from dartfx.integrations.prompts import Conversation

__all__ = ["OnDemand", "document", "from_visuals", "settings_of"]

T = TypeVar("T")

# Generation arguments without a field in Settings: for other models, or without effect.
_TAKEN = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "until"}


class OnDemand(Sequence[T]):
    """Computes ``make(i)`` for i < ``length`` on each access: stored images would fill memory."""

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._length)[index]]
        return self._make(range(self._length)[index])


def document(tasks: Mapping[str, Any], arguments: Sequence[Any]) -> Any:
    """Return a request's document; ``tasks`` is lmms-eval's ``task_dict``.

    Raises ValueError for a request without a document (a text-only likelihood).
    """
    if len(arguments) != 6:
        raise ValueError(
            "a request without a document (metric acc_mutual_info) asks for the likelihood of text "
            f"alone, which this model does not measure: {tuple(arguments)!r}"
        )
    *_, number, task, split = arguments
    return tasks[task][split][number]


def from_visuals(context: str, visuals: Sequence[Any] | None) -> Conversation:
    """Build one user turn: images (Pillow) and videos (paths), then the context.

    Raises TypeError for anything else, such as audio.
    """
    parts: list[dict[str, Any]] = []
    for visual in visuals or ():
        if isinstance(visual, str):
            parts.append({"type": "video", "video": visual})
        elif hasattr(visual, "convert"):
            parts.append({"type": "image", "image": visual.convert("RGB")})
        else:
            raise TypeError(
                f"a document has a {type(visual).__name__} to look at; known are Pillow images and "
                "paths of videos"
            )
    return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]


def settings_of(given: Mapping[str, Any], ignored: set[str]) -> Settings:
    """Convert a task's generation settings; unsupported names are added to ``ignored``.

    A temperature of 0 means greedy, whatever ``do_sample`` says.
    """
    ignored |= given.keys() - _TAKEN
    warmth = given.get("temperature")
    sample = bool(given.get("do_sample", bool(warmth))) and warmth != 0
    until = given.get("until") or ()
    return Settings(
        max_new_tokens=int(given.get("max_new_tokens", Settings.max_new_tokens)),
        sample=sample,
        temperature=float(warmth) if sample and warmth else None,
        top_p=given.get("top_p") if sample else None,
        beams=int(given.get("num_beams") or 1),
        until=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
    )
