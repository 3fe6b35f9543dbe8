"""Later turns of a conversation as they should be: a whole cache, of which a mask hides columns.

Nothing of this comes from the compiler or from its cache layers: a prefill pruned by hooks fills a
cache as long as the prompt, with large numbers in the columns of what was dropped, and a 4-D mask
hides those from all that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family, Inputs
from tests.support.tolerances import RETAIN

_DROPPED = 1e3


class Conversation:
    """A conversation with the eager model; logits: of the last call, [B, t, V]."""

    def __init__(self, built: Family, inputs: Inputs) -> None:
        first = hooked.pruned_forward(built.model, inputs, retain=RETAIN, kv_layout="uniform")
        ids = inputs["input_ids"]
        self._model, self.keep_idx, self.logits = built.model, first.keep_idx, first.logits
        self.attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        kept = torch.zeros_like(self.attended).scatter(1, first.keep_idx, True)
        self._visible = self.attended & kept
        self._cache = DynamicCache(config=built.model.config)
        for place, pair in enumerate(zip(first.keys, first.values, strict=True)):
            self._cache.update(*(self._whole(part, ids.shape[1]) for part in pair), place)

    def _whole(self, short: Tensor, length: int) -> Tensor:
        rows, heads, _, size = short.shape
        index = self.keep_idx[:, None, :, None].expand_as(short)
        return torch.full((rows, heads, length, size), _DROPPED).scatter(2, index, short)

    @torch.no_grad()
    def say(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [B, t, V] of more text; valid: false at pads among it."""
        new = torch.ones_like(ids).bool() if valid is None else valid
        before, tokens = self.attended.shape[1], ids.shape[1]
        self.attended = torch.cat([self.attended, new], 1)
        self._visible = torch.cat([self._visible, new], 1)
        causal = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
        mask = causal & self._visible[:, None, None]
        # A pad sees at least itself, so that softmax has something to normalise.
        mask = mask | torch.eye(tokens, before + tokens, dtype=torch.bool).roll(before, 1)
        positions = (self.attended.cumsum(1) - 1).clamp(min=0)[:, before:]
        self.logits = self._model(
            input_ids=ids,
            past_key_values=self._cache,
            attention_mask=mask,
            position_ids=positions,
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
