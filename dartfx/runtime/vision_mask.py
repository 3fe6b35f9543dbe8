"""Sources of the vision mask when the decoder's graph does not contain the merge.

An earlier graph of the same call recorded it for the embeddings it returned; or the caller gave it
with :func:`vision_tokens`; or the embeddings are compared with those of the call's token ids, where
features were merged in code that dynamo does not trace.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dartfx.passes.refusal import ONE_GRAPH
from dartfx.runtime.collecting import collecting

__all__ = [
    "MaskRecord",
    "any_noted",
    "clear",
    "collect_masks",
    "compared",
    "find",
    "given",
    "given_elsewhere",
    "given_for",
    "lost",
    "media_tokens",
    "record",
    "text_of",
    "vision_tokens",
]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskRecord:
    """A vision mask [B, S] bool, its number of feature rows in the batch, and how it was found.

    version: that of the embeddings when it was recorded; consumed: set once a decoder has read it.
    """

    mask: Tensor
    rows: int
    how: str
    version: int | None = None
    consumed: threading.Event = field(default_factory=threading.Event, compare=False)


LOST = (
    "vision tokens were merged in one graph, but no compiled decoder took the merged embeddings as "
    "they were, so that call ran unpruned"
)
LOST_ADVICE = f"{ONE_GRAPH}; or say where the tokens are with dartfx.vision_tokens"

_LOCK = threading.Lock()
# Keyed by tensor object: threads, streams and prompts never share a record, and a record dies with
# its embeddings.
_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_given: ContextVar[MaskRecord | None] = ContextVar("dartfx_vision_tokens", default=None)
_open: dict[int, MaskRecord] = {}  # of all threads
_collected: ContextVar[list[MaskRecord] | None] = ContextVar("dartfx_masks", default=None)


def record(embeds: Tensor, mask: Tensor, rows: int) -> None:
    """Record the mask of this embeddings tensor [B, S, D] for its lifetime.

    Embeddings that no compiled decoder consumed mean that pruning silently did not happen, so a
    warning is logged when they are freed.
    """
    found = MaskRecord(mask, rows, "merge in an earlier graph", _version(embeds))
    with _LOCK:
        _records[embeds] = found
    if (collected := _collected.get()) is not None:
        collected.append(found)
    weakref.finalize(embeds, _report_lost, found.consumed).atexit = False


def find(embeds: Tensor) -> MaskRecord | None:
    """The record for these embeddings; None if there is none or they were mutated since."""
    with _LOCK:
        found: MaskRecord | None = _records.get(embeds)  # type: ignore[no-untyped-call]
    if found is None or found.version != _version(embeds):
        return None
    found.consumed.set()
    return found


def any_noted(inputs: Iterable[object]) -> bool:
    """Whether any of a graph's inputs are embeddings with a record."""
    with _LOCK:
        return any(isinstance(value, Tensor) and value in _records for value in inputs)


def collect_masks() -> AbstractContextManager[list[MaskRecord]]:
    """Collect records made inside the ``with`` block; those left unconsumed pruned nothing."""
    return collecting(_collected)


def lost(noted: Sequence[MaskRecord], tokens: int, elsewhere: bool) -> bool:
    """Whether any of a call's records is for tokens that should have been dropped and were not.

    An audio tower that packs its frames also merges, into a sequence that is not the decoder's.
    tokens: the prompt's length, 0 if unknown; elsewhere: whether another graph handled vision
    tokens.  The records are then marked as consumed, so that none is reported twice.
    """
    used = {record.mask.shape for record in noted if record.consumed.is_set()}
    left = [record for record in noted if not record.consumed.is_set()]
    for record in left:
        record.consumed.set()
    if used:
        left = [record for record in left if record.mask.shape in used]
    elif elsewhere and tokens:
        left = [record for record in left if record.mask.shape[1] == tokens]
    return bool(left)


def _report_lost(consumed: threading.Event) -> None:
    if not consumed.is_set():
        log.warning("%s; try %s", LOST, LOST_ADVICE)


class _Text(NamedTuple):
    """A prompt's token ids [B, S], and the module that embeds them."""

    ids: Tensor
    embed: nn.Module


_text: ContextVar[_Text | None] = ContextVar("dartfx_text", default=None)


@contextmanager
def text_of(model: nn.Module, ids: object) -> Iterator[None]:
    """Provide a prompt's token ids [B, S] to :func:`compared` inside the ``with`` block.

    Does nothing if ``ids`` are no token ids, or the model does not expose its embedding module.
    """
    # A decode step has none, and skips the lookup of the module.
    embed = _embedding(model) if isinstance(ids, Tensor) and ids.ndim == 2 else None
    if not isinstance(ids, Tensor) or embed is None:
        yield
        return
    token = _text.set(_Text(ids, embed))
    try:
        yield
    finally:
        _text.reset(token)


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    plain = type(getattr(embed, "weight", None)) in (Tensor, nn.Parameter)
    return embed if plain and embed.weight.ndim == 2 else None


def compared(embeds: Tensor) -> MaskRecord | None:
    """The mask of embeddings [B, S, D] that differ from those of the prompt's token ids.

    A token id is a feature placeholder if it stands for several different features; one row for all
    (such as an image marker that a model embeds itself) is not a feature.  None if all or none
    differ.  Reads the embeddings once (a host synchronisation on an accelerator).
    """
    text = _text.get()
    copies, rest = divmod(embeds.shape[0], text.ids.shape[0]) if text else (0, 0)
    if text is None or rest or embeds.shape[1] != text.ids.shape[1]:
        return None
    weight: Any = text.embed.weight
    with torch.no_grad():
        ids = text.ids.repeat_interleave(copies, 0)  # ``generate`` repeats rows for its beams
        # Placeholders may be outside the vocabulary.
        plain = text.embed(ids.to(weight.device).clamp(0, weight.shape[0] - 1))
        if not isinstance(plain, Tensor) or plain.shape != embeds.shape:
            return None
        differs = (embeds != plain.to(embeds.device)).any(-1)
        if bool(differs.all()):
            return None
        ids, mask = ids.to(embeds.device), torch.zeros_like(differs)
        for token in torch.unique(ids[differs]).tolist():
            at = differs & (ids == token)
            rows = embeds[at]
            if bool((rows != rows[:1]).any()):
                mask |= at
        count = int(mask.sum())
    if not count:
        return None
    found = MaskRecord(mask, count, "embeddings that are not of token ids", _version(embeds))
    with _LOCK:
        _records[embeds] = found
    found.consumed.set()
    return found


def given() -> MaskRecord | None:
    """The mask given by an enclosing :func:`vision_tokens`."""
    return _given.get()


def given_for(rows: int, length: int) -> MaskRecord | None:
    """The given mask for a prompt [rows, length]; None if it does not fit.

    ``generate`` repeats each row of a prompt for beams and for ``num_return_sequences``.
    """
    found = given()
    if found is None or found.mask.shape[1] != length:
        return None
    copies, rest = divmod(rows, found.mask.shape[0])
    if rest or not copies:
        return None
    if copies == 1:
        return found
    return MaskRecord(found.mask.repeat_interleave(copies, 0), found.rows * copies, found.how)


def given_elsewhere() -> bool:
    """Whether another thread is inside :func:`vision_tokens` and this one is not."""
    return given() is None and bool(_open)


def clear() -> None:
    """Drop every record."""
    with _LOCK:
        _records.clear()


@contextmanager
def vision_tokens(mask: Tensor) -> Iterator[None]:
    """Mark the positions of vision tokens, for callers who build ``inputs_embeds`` themselves.

    mask: [B, S] bool, as long as the prompt; calls of another length (decode steps) ignore it.
    ``generate`` may repeat its rows (beams, num_return_sequences).  Applies to this thread only.
    A merge found in the graph itself takes precedence.  Reads ``mask`` once (a host synchronisation
    on an accelerator).  Raises ValueError for another shape or dtype.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:
        shown = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"vision_tokens needs a bool tensor [B, S], got {shown}")
    found = MaskRecord(mask, int(mask.sum()), "given")
    token = _given.set(found)
    with _LOCK:
        _open[id(found)] = found
    try:
        yield
    finally:
        _given.reset(token)
        with _LOCK:
            del _open[id(found)]


# The same for tokens of any kind: only their positions matter.
media_tokens = vision_tokens


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
