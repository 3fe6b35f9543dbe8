"""Custom cache layers of models: which of them can count a pruned prompt's dropped tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from dartfx.errors import SelectionError
from dartfx.model.caches.counting import note_uncounted, require_counted, uncounted


class Ordinary(DynamicLayer):
    """As transformers' own, of another module."""


class Elsewhere(DynamicLayer):
    """Keeps tokens under a name of its own."""

    held: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> Any:
        self.held = keys if self.held is None else torch.cat([self.held, keys], -2)
        self.is_initialized = True
        return self.held, self.held

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held.shape[-2]


class WantsMore(Elsewhere):
    """Takes a call that nobody else makes."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, index: Tensor, **more: Any) -> Any:
        return super().update(keys + index, values)


def cache_of(layer: type[DynamicLayer]) -> Cache:
    return Cache(layers=[layer()])


def test_layers_of_a_models_own_are_tried() -> None:
    assert uncounted([cache_of(DynamicLayer), cache_of(Ordinary)]) is None
    refused = uncounted([cache_of(Elsewhere)])
    assert refused is not None
    assert "Elsewhere" in refused.because


def test_a_layer_that_cannot_be_tried_is_seen_when_it_is_filled() -> None:
    cache, kv = cache_of(WantsMore), torch.zeros(1, 1, 3, 4)
    assert uncounted([cache]) is None
    note_uncounted(cache)
    require_counted(cache)
    cache.layers[0].update(kv, kv, index=kv)
    note_uncounted(cache)
    with pytest.raises(SelectionError, match="WantsMore"):
        require_counted(cache)
