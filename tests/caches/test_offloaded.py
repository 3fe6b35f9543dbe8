"""Caches offloaded to the host: when they are refused, and synchronisation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import dartfx
from dartfx import compat
from dartfx.model.caches.filling import growing_copy
from dartfx.model.caches.pruned_layers import make_pruned
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN


@pytest.fixture
def on_its_way(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An offloaded cache with 5 tokens in one layer, which get there with a synchronisation."""
    cache, kv = DynamicCache(), torch.zeros(1, 2, 5, 4)
    cache.update(kv, kv, 0)
    cache.offloading = True
    layer = cache.layers[0]
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: layer.keys.fill_(1.0))
    return cache


@pytest.mark.parametrize(
    ("version", "race"),
    [("5.17.0", True), ("5.19.1", True), ("5.20.0", False), ("5.20.0.dev0", False), ("6.0", False)],
)
def test_transformers_before_5_20_races(
    version: str, race: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert compat.offloaded_caches_race() == race


def test_an_image_on_a_cache_that_races_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.19.0")
    built = load("llava", layers=3)
    model = dartfx.compile(built.model, retain_tokens=RETAIN, on_unsupported="error")
    with pytest.raises(
        dartfx.UnsupportedGraphError,
        match=r"offloaded KV cache.*transformers 5\.19\.0 copies[\s\S]*try: transformers>=5\.20",
    ):
        model(**built.make_inputs("one"), past_key_values=DynamicCache(offloading=True))


def test_a_growing_copy_waits_for_layers_on_their_way(on_its_way: Any) -> None:
    assert growing_copy(on_its_way).layers[0].keys.eq(1).all()


def test_a_pruned_layer_is_cropped_when_it_has_come(on_its_way: Any) -> None:
    make_pruned(on_its_way.layers, 0, dropped=3, kept=None)
    on_its_way.layers[0].offloaded = True
    on_its_way.crop(-2)
    assert on_its_way.layers[0].keys.shape[-2] == 3
    assert on_its_way.layers[0].keys.eq(1).all()
