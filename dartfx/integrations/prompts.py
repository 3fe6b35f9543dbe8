"""Turns conversations in Hugging Face's chat format into batches of model inputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Batch", "Conversation", "Prompts", "prompt_text"]

# [{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}]
Conversation = list[dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """Indices of conversations, their model inputs, and whether they contain images or videos.

    Either all of them do or none does.
    """

    numbers: tuple[int, ...]
    inputs: Any
    sees: bool


def _has_vision(conversation: Conversation) -> bool:
    return any(part["type"] in ("image", "video") for part in _parts(conversation))


def _parts(conversation: Conversation) -> Iterator[dict[str, Any]]:
    for message in conversation:
        yield from message["content"]


class Prompts:
    """Processes conversations in batches of ``batch_size``.

    num_frames: frames sampled per video; None is the processor's default.
    """

    def __init__(self, processor: Any, batch_size: int, num_frames: int | None = None) -> None:
        self._processor, self._size, self._frames = processor, batch_size, num_frames
        self.tokenizer = processor.tokenizer
        # Generation continues after the last column, so padding goes in front.
        self.tokenizer.padding_side = "left"

    def decode(self, ids: Tensor) -> list[str]:
        """Decode token ids [B, T] to texts."""
        return list(self._processor.batch_decode(ids, skip_special_tokens=True))

    def batches(
        self, conversations: Sequence[Conversation], settings: Sequence[Hashable]
    ) -> Iterator[Batch]:
        """Yield batches whose conversations have equal settings and equally many vision tokens.

        Texts of different lengths are padded on the left.
        """
        if self._size == 1:
            for number, one in enumerate(conversations):
                yield Batch((number,), self._inputs([one]), _has_vision(one))
            return
        alike: dict[object, list[tuple[int, int]]] = {}
        for number, (one, how) in enumerate(zip(conversations, settings, strict=True)):
            length, form = self._form(one)
            alike.setdefault((how, form), []).append((length, number))
        for group in alike.values():
            # Group similar lengths: little padding, and peak memory first.
            numbers = [number for _, number in sorted(group, reverse=True)]
            for start in range(0, len(numbers), self._size):
                chosen = tuple(numbers[start : start + self._size])
                some = [conversations[number] for number in chosen]
                yield Batch(chosen, self._inputs(some), _has_vision(some[0]))

    def _form(self, conversation: Conversation) -> tuple[int, Hashable]:
        """The prompt's length, and everything that determines its number of vision tokens.

        These are the shapes of all non-text inputs, and integer inputs, which hold grids and sizes.
        """
        if not _has_vision(conversation):
            return len(self.text(conversation)), None
        made = self._inputs([conversation])
        text = made["input_ids"].shape
        others = {k: v for k, v in made.items() if getattr(v, "shape", ())[:2] != text}
        return text[1], tuple((name, _shown(value)) for name, value in sorted(others.items()))

    def _inputs(self, conversations: Sequence[Conversation]) -> Any:
        more: dict[str, Any] = {"padding": len(conversations) > 1, "return_tensors": "pt"}
        if _has_template(self._processor):
            if self._frames and any(p["type"] == "video" for c in conversations for p in _parts(c)):
                more["num_frames"] = self._frames
            return self._processor.apply_chat_template(
                list(conversations),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs=more,
            )
        images = [[p["image"] for p in _parts(c) if p["type"] == "image"] for c in conversations]
        texts = [self.text(one) for one in conversations]
        return self._processor(text=texts, images=images if any(images) else None, **more)

    def text(self, conversation: Conversation) -> str:
        """The prompt's text; see :func:`prompt_text`."""
        return prompt_text(self._processor, conversation)

    def continuation(self, conversation: Conversation, text: str) -> list[int]:
        """The token ids that ``text`` adds to the prompt.

        Leading whitespace is removed if the prompt ends with whitespace.
        """
        prompt = self.text(conversation)
        text = text.lstrip() if prompt[-1:].isspace() else text
        before, both = map(self._ids, (prompt, prompt + text))
        # A tokeniser may merge the prompt's last word with the continuation's first.
        return both[len(before) :] if both[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_text(processor: Any, conversation: Conversation) -> str:
    """Render a conversation as prompt text with placeholders for images and videos.

    Without a chat template: one image token per line, then the texts.  Videos then raise
    ValueError, since their placeholder is unknown.
    """
    if _has_template(processor):
        return str(processor.apply_chat_template(conversation, add_generation_prompt=True))
    lines = []
    for part in _parts(conversation):
        if part["type"] == "video":
            raise ValueError(
                "the processor has no chat template, so how it writes a video is not known"
            )
        lines.append(processor.image_token if part["type"] == "image" else part["text"])
    return "\n".join(lines)


def _has_template(processor: Any) -> bool:
    return bool(getattr(processor, "chat_template", None))


def _shown(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        exact = not value.is_floating_point()
        return (tuple(value.shape), value.dtype, value.numpy().tobytes() if exact else b"")
    if isinstance(value, list | tuple):
        return tuple(map(_shown, value))
    return value if isinstance(value, Hashable) else repr(value)
