"""Pruning in stages by forward hooks on an eager model: the reference for ``layer=[...]``.

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

from dartfx.tools.zoo.hooked import Inputs, SelectionInputs, Selector, float64_selector, take
from dartfx.tools.zoo.hooks import Hooks
from dartfx.tools.zoo.oracle import as_float64
from dartfx.tools.zoo.oracle import select as oracle_select

_UPDATE = Cache.update


def selector(vision_tokens: int | None) -> Selector:
    """The oracle's selection from rows that hold ``vision_tokens`` each, by the plan.

    A row that had to keep more at an earlier cut holds more; S' does not depend on it.
    """

    def select(selection_inputs: SelectionInputs, retain: int) -> Tensor:
        if vision_tokens is None:
            return float64_selector(selection_inputs, retain)
        hidden, keys = as_float64(selection_inputs.hidden), as_float64(selection_inputs.keys)
        rows, length = [], hidden.shape[1] - vision_tokens + retain
        for row, (vision, valid) in enumerate(
            zip(selection_inputs.vision, selection_inputs.valid, strict=True)
        ):
            pool, words, pads = (
                marks.nonzero()[:, 0].tolist()
                for marks in (vision, valid & ~vision, ~valid & ~vision)
            )
            budget = min(len(pool), max(retain, length - len(words) - len(pads)))
            after = [p for p in words if p > pool[-1]]
            kept = oracle_select(hidden[row], keys[row], pool, after, budget, 4, 4).kept
            spare = length - len(words) - len(kept)
            rows.append(sorted(kept + words + pads[len(pads) - spare :]))
        return torch.tensor(rows)

    return select


class Stages:
    """keep_idx: of each stage, in the positions of the sequence that it got."""

    def __init__(
        self, model: Any, inputs: Inputs, layers: Sequence[int], retain: Sequence[int]
    ) -> None:
        held = [None, *retain]
        self.hooks = [
            Hooks(model, inputs, layer, left, selector(before))
            for layer, left, before in zip(layers, retain, held, strict=False)
        ]
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
            if index < hooks.layer and hooks.selection_inputs is None:
                hooks.stored[index] = keys, values
        return _UPDATE(cache, keys, values, index, *more)

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

        def before_decoder(_: Any, args: Any, kwargs: Any) -> Any:
            padding, keeps = kwargs.get("attention_mask"), self.keep_idx
            if uniform and len(keeps) == len(self.hooks) and isinstance(padding, Tensor):
                # Decode reads the caches by the mask's first columns, so those are gathered alike.
                prompt = self.hooks[0].valid.shape[1]
                columns = padding[:, :prompt].gather(1, self.kept(len(keeps)))
                kwargs["attention_mask"] = torch.cat([columns, padding[:, prompt:]], 1)
            return args, kwargs

        handles = [
            self.decoder.register_forward_hook(after_decoder),
            self.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
        ]
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
