"""Pruning in stages by forward hooks on an eager model: what ``layer=[...]`` is compared with.

One set of hooks per stage, each as for a single cut.  A later stage sees what the one before it
left: its vision mask and its valid positions are gathered, and so are all arguments of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dartfx.zoo.hooked import _CACHE_UPDATE, Inputs, _Hooks, float64_selector, take


class Stages:
    """keep_idx: of each stage, in the positions of the sequence that it got."""

    def __init__(
        self, model: Any, inputs: Inputs, layers: Sequence[int], retain: Sequence[int]
    ) -> None:
        pairs = list(zip(layers, retain, strict=True))
        self.hooks = [_Hooks(model, inputs, k, r, float64_selector) for k, r in pairs]
        self.decoder = self.hooks[0].decoder

    @property
    def keep_idx(self) -> list[Tensor]:
        return [hooks.keep_idx for hooks in self.hooks if hooks.keep_idx is not None]

    def kept(self, stages: int) -> Tensor:
        """The prompt's positions [B, S'] that are left after the first ``stages`` cuts."""
        keep = self.keep_idx[0]
        for later in self.keep_idx[1:stages]:
            keep = keep.gather(1, later)
        return keep

    def before_layer(self, index: int, args: Any, kwargs: Any) -> Any:
        for number, hooks in enumerate(self.hooks):
            if index < hooks.layer:
                break
            if index == hooks.layer and number and hooks.keep_idx is None:
                keep = self.hooks[number - 1].keep_idx
                hooks.vision, hooks.valid = (
                    mask.gather(1, keep)
                    for mask in (self.hooks[number - 1].vision, self.hooks[number - 1].valid)
                )
            args, kwargs = hooks.before_layer(index, args, kwargs)
        return args, kwargs

    def update(self, cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        for hooks in self.hooks:
            if index < hooks.layer and hooks.evidence is None:
                hooks.stored[index] = keys, values
        return _CACHE_UPDATE(cache, keys, values, index, *more)

    def compact(self, cache: Any) -> None:
        """Uniform caches: every layer's keys go through the cuts that come after it.

        A sliding layer that its keys overflowed holds the last of them, whatever was dropped.
        """
        for index, stored in self.hooks[-1].stored.items():
            if cache.layers[index].keys.shape[2] != stored[0].shape[2]:
                continue
            for hooks in self.hooks:
                if index < hooks.layer:
                    stored = tuple(take(t, hooks.keep_idx, 2) for t in stored)
            cache.layers[index].keys, cache.layers[index].values = stored

    @contextmanager
    def __call__(self, uniform: bool) -> Iterator[None]:
        def after_decoder(_: Any, __: Any, output: Any) -> None:
            if self.hooks[0].prefilling and uniform:
                self.compact(output.past_key_values)
            for hooks in self.hooks:
                hooks.prefilling = False

        handles = [self.decoder.register_forward_hook(after_decoder)]
        for index, layer in enumerate(self.decoder.layers):
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: self.before_layer(index, args, kwargs),
                    with_kwargs=True,
                )
            )
        recorder: Any = lambda *args, **kwargs: self.update(*args, **kwargs)  # noqa: E731
        try:
            with torch.no_grad(), mock.patch.object(Cache, "update", recorder):
                yield
        finally:
            for handle in handles:
                handle.remove()
