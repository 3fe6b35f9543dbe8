"""Reference turns of a conversation: a full cache with masked columns.

Nothing of this comes from the compiler or from its cache layers: an eager model computes all
tokens, and a 4-D mask hides what was dropped: from layer K on in the call that brings an image, and
in all layers from all that follows.  Pivots are tokens of that call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import dartfx
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.hooked import SelectionInputs, float64_selector
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN

_LAYER = 2


class Conversation:
    """A conversation with the eager model; logits: of the last call, [B, t, V]; keep_idx: which of
    an image's call were kept [B, t']."""

    keep_idx: Tensor
    logits: Tensor

    def __init__(self, built: Family, inputs: Inputs | None = None, cache: Any = None) -> None:
        self._model: Any = built.model
        self._cache = DynamicCache(config=built.model.config) if cache is None else cache
        self._stored: dict[int, Tensor] = {}  # keys of the last call by layer
        self._cache.update = self._update
        self.attended = self._visible = torch.empty(0, 0, dtype=torch.bool)
        if inputs is not None:
            self.show(inputs)

    def show(self, inputs: Inputs, retain: int = RETAIN) -> Tensor:
        """Logits [B, t', V] of the tokens that are kept of a prompt with images.

        Positions follow the cache's length, as in a call of the model that does not say them.
        """
        start, tokens = self.attended.shape[1], inputs["input_ids"].shape[1]
        given = {"position_ids": torch.arange(start, start + tokens)[None]} | inputs
        ids, valid = given.pop("input_ids"), given.pop("attention_mask", None)
        with self._pruning(ids, valid, retain):
            logits = self.say(ids, valid if valid is None else valid.bool(), **given)
        kept = torch.zeros_like(ids).bool().scatter(1, self.keep_idx, True)
        self._visible[:, -ids.shape[1] :] &= kept
        self.logits = logits.gather(1, self.keep_idx[..., None].expand(-1, -1, logits.shape[-1]))
        return self.logits

    @contextmanager
    def _pruning(self, ids: Tensor, valid: Tensor | None, retain: int) -> Iterator[None]:
        """Hide what the selection drops from the layers behind the cut."""
        decoder, tokens = self._model.get_decoder(), ids.shape[1]
        vision = ids == self._model.config.image_token_id
        valid = torch.ones_like(ids) if valid is None else valid

        def select(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keys = self._stored[_LAYER - 1]
            seen = SelectionInputs(decoder.norm(args[0]), keys, vision, valid.bool())
            self.keep_idx = float64_selector(seen, retain)

        def hide(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kept = torch.zeros_like(vision).scatter(1, self.keep_idx, True)
            mask = kwargs["attention_mask"].clone()
            itself = torch.eye(tokens, dtype=torch.bool)
            mask[..., -tokens:] &= kept[:, None, None] | itself
            return args, kwargs | {"attention_mask": mask}

        hooks = [
            (decoder.layers[_LAYER], select),
            *((each, hide) for each in decoder.layers[_LAYER:]),
        ]
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _update(self, keys: Tensor, values: Tensor, layer: int, *more: Any) -> Any:
        self._stored[layer] = keys
        return type(self._cache).update(self._cache, keys, values, layer, *more)

    @torch.no_grad()
    def say(self, ids: Tensor, valid: Tensor | None = None, **more: Any) -> Tensor:
        """Logits [B, t, V] of more text; valid: false at pads among it."""
        new = torch.ones_like(ids).bool() if valid is None else valid
        before, tokens = self.attended.shape[1], ids.shape[1]
        if before == 0:
            self.attended = self._visible = torch.empty(len(ids), 0, dtype=torch.bool)
        self.attended = torch.cat([self.attended, new], 1)
        self._visible = torch.cat([self._visible, new], 1)
        causal = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
        mask = causal & self._visible[:, None, None]
        # A pad sees at least itself, so that softmax has something to normalise.
        mask = mask | torch.eye(tokens, before + tokens, dtype=torch.bool).roll(before, 1)
        positions = (self.attended.cumsum(1) - 1).clamp(min=0)[:, before:]
        call = {"position_ids": positions, **more}
        self.logits = self._model(
            input_ids=ids,
            past_key_values=self._cache,
            attention_mask=mask,
            **call,
        ).logits
        return self.logits

    def answer(self, tokens: int) -> Tensor:
        """Greedy tokens [B, tokens] after what was said last."""
        said = []
        for _ in range(tokens):
            said.append(self.logits[:, -1:].argmax(-1))
            self.say(said[-1])
        return torch.cat(said, 1)

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens."""
        self._cache.crop(-tokens)
        self.attended = self.attended[:, :-tokens]
        self._visible = self._visible[:, :-tokens]


@functools.cache
def llava() -> Family:
    return load("llava", layers=3)


@functools.cache
def compiled() -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}
    return dartfx.compile(copy.deepcopy(llava().model), **settings)


def one() -> Inputs:
    inputs = llava().make_inputs()
    del inputs["attention_mask"]
    return inputs


def words(rows: int, tokens: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (rows, tokens), generator=made)


def first_turn(inputs: Inputs) -> Any:
    """The pruned cache of a prompt."""
    with torch.no_grad():
        return compiled()(**inputs, use_cache=True).past_key_values


def greedy(model: Any, **arguments: Any) -> Any:
    return model.generate(**arguments, do_sample=False, return_dict_in_generate=True)
