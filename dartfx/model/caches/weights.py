"""Which weights filled a KV cache, to detect another model's cache of the same shape."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from dartfx.errors import SelectionError
from dartfx.model.caches.pruned_layers import KeptColumns

__all__ = ["Weights"]

_SAMPLES = 64  # of each parameter


class Weights:
    """A model's weights, identified by a sample of its first and last decoder layer.

    In bfloat16, so that a model moved to another device or dtype is the same, and one loaded in
    another process.  Parameters that are shards, quantised or not in memory are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: list[tuple[int, int]] = []
        self._digest: str | None = None
        self._continued: KeptColumns | None = None

    def digest(self) -> str | None:
        """Their digest, or None; recomputed only where parameters changed."""
        sampled = self._sampled()
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in sampled]
        if state != self._state:
            self._state, self._digest = state, _digest(sampled)
        return self._digest

    def require_own(self, kept: KeptColumns | None) -> None:
        """Raise SelectionError where other weights computed what a pruned cache holds."""
        if kept is None or kept is self._continued:  # as in every decode step
            return
        own = self.digest()
        if None not in (kept.weights, own) and kept.weights != own:
            raise SelectionError(
                "a pruned KV cache came that was filled with other weights than this model's: "
                "another model's, or before weights were loaded or trained. Give each model the "
                "caches that it filled, or compute the conversation again"
            )
        self._continued = kept

    def _sampled(self) -> list[Tensor]:
        get_decoder: Any = getattr(self._model, "get_decoder", None)
        layers: Any = getattr(get_decoder(), "layers", ()) if callable(get_decoder) else ()
        ends = [layers[0], layers[-1]] if len(layers) else []
        return [
            parameter
            for layer in ends
            for parameter in layer.parameters()
            if type(parameter) is nn.Parameter and parameter.is_floating_point()
            if parameter.device.type != "meta"
        ]


@torch.no_grad()
def _digest(parameters: list[Tensor]) -> str | None:
    if not parameters:
        return None
    flat = [each.flatten() for each in parameters]
    some = [each[:: max(1, len(each) // _SAMPLES)][:_SAMPLES].bfloat16().cpu() for each in flat]
    return hashlib.sha256(repr(torch.cat(some).tolist()).encode()).hexdigest()
