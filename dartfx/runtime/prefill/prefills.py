"""Runs a compiled model's prefills as recordings, of prompts as they are or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dartfx.runtime.prefill.padding import is_plain_prefill, padded, without_mask
from dartfx.runtime.prefill.recorded import Recordings
from dartfx.runtime.prefill.recorder import CudaGraphs

__all__ = ["MULTIPLE", "Prefills"]

MULTIPLE = 64  # of tokens; GPU matrix products process tiles of this many rows


class Prefills:
    """The prefills of one model.  multiple: prompts are padded to multiples of it; 1: never."""

    def __init__(self, model: nn.Module, multiple: int) -> None:
        self.recordings = Recordings(model, CudaGraphs())
        self._model, self._multiple = model, multiple

    def prepared(self, kwargs: dict[str, Any], caches: Sequence[Any]) -> tuple[dict[str, Any], int]:
        """Return a call's arguments for recordings, and the number of pads in front.

        A call in which pads would be visible keeps its arguments and length.
        """
        if not is_plain_prefill(kwargs, caches):
            return kwargs, 0
        if self._multiple == 1:
            return without_mask(kwargs), 0
        ids = kwargs["input_ids"]
        pads = -ids.shape[1] % self._multiple
        return padded(kwargs, pads, self._pad(ids)), pads

    def _pad(self, ids: Any) -> Any:
        """A non-image token id: begin or end of text, or the prompt's last token."""
        settings = getattr(self._model, "generation_config", None)
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(found := getattr(settings, name, None), int):
                return found
        return ids[:, -1:]
