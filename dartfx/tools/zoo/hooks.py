"""Hooks that prune one call of an eager model, or only observe it.

They are the reference in tests and a baseline in benchmarks, so they cost as little as hooks can:
an argument that the layers share is gathered once, and nothing is left on the decoder's layers
after the prefill.  With the shape ``small`` (12 layers), four new tokens and dartfx's operator as
the selector they add 17 ATen calls to the unpruned model's 3780 (torch 2.13.0, transformers 5.23.0,
2026-11-28).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from dartfx.tools.zoo.gather import Late, gather_argument, take, take_tokens
from dartfx.tools.zoo.merging import merged
from dartfx.tools.zoo.selection_inputs import (
    SelectionInputs,
    Selector,
    attention_keys,
    final_norm,
    replaced,
)

__all__ = ["Hooks", "Inputs", "KvLayout", "SelectionInputs", "Selector", "installed"]

KvLayout = Literal["layered", "uniform"]
Inputs = dict[str, Any]


class Hooks:
    """The hooks of one call; ``selector`` None only observes.

    vision: [B, S] bool, if it is not where ``input_ids`` are ``image_token_id``.
    """

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        layer: int,
        retain: int,
        selector: Selector | None,
        decoder: Any = None,
        image_token_id: int | None = None,
        latent_cache: bool = False,
        merge: bool = False,
        vision: Tensor | None = None,
    ) -> None:
        self.decoder = model.get_decoder() if decoder is None else decoder
        depth = len(self.decoder.layers)
        if not 0 <= layer < depth:
            raise ValueError(
                f"layer={layer}; a model of {depth} layers can be cut at 0..{depth - 1}"
            )
        ids = inputs["input_ids"]
        if vision is None:
            vision = ids == (
                model.config.image_token_id if image_token_id is None else image_token_id
            )
        self.vision = vision
        self.valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.layer, self.retain, self.selector = layer, retain, selector
        self.selection_inputs: SelectionInputs | None = None
        self.keep_idx: Tensor | None = None
        self.prefilling = False
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.latent_cache, self.merge = latent_cache, merge
        self.uniform = False
        self.attended: Tensor | None = None
        self._gathered: dict[tuple[str, int, bool], tuple[Any, Any]] = {}

    def update(self, cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        """Replacement for ``Cache.update`` that records the prompt KV stored before layer K.

        The cache itself may hold less afterwards, if a layer's window is short.
        """
        # Layered caches are not compacted: only the keys to rank by are needed.  Holding more costs
        # time, since later layers would allocate fresh pages.
        needed = index < self.layer if self.uniform else index == self.layer - 1
        if needed and self.selection_inputs is None:
            self.stored[index] = keys, values if self.uniform else keys
        return _CACHE_UPDATE(cache, keys, values, index, *more)

    def note_attended(self, keys: Tensor) -> None:
        """Record the keys that layer K-1 passes to its attention call."""
        if self.selection_inputs is None:
            self.attended = keys

    def before_layer(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of decoder layer ``index`` >= K."""
        hidden, kwargs = self._split(index, args, kwargs)
        tokens = hidden.shape[-2]
        if tokens == 1 and not self.prefilling:
            return (hidden,), kwargs
        if index == self.layer:
            self._select(hidden)
        if self.selector is None:
            return (hidden,), kwargs
        assert self.keep_idx is not None
        if index == self.layer:
            seen = self.selection_inputs
            if self.merge and seen is not None:
                hidden = merged(hidden, seen.hidden, self.keep_idx, self.vision)
            hidden = take_tokens(hidden, self.keep_idx, -2)
        gathered = {
            k: self._gather(k, v, tokens == 1) for k, v in kwargs.items() if k != "past_key_values"
        }
        return (hidden,), kwargs | gathered

    def _split(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """A decoder layer's hidden states, and its other arguments by name."""
        if len(args) == 1:
            return args[0], kwargs
        names = list(inspect.signature(self.decoder.layers[index].forward).parameters)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        return kwargs.pop(names[0]), kwargs

    def _gather(self, name: str, value: Any, last_only: bool) -> Any:
        """:func:`gather_argument`, once for all layers that get the same object."""
        assert self.keep_idx is not None
        key = name, id(value), last_only
        if key not in self._gathered:
            # With the object itself, whose id would else be free for another one.
            self._gathered[key] = value, gather_argument(name, value, self.keep_idx, last_only)
        return self._gathered[key][1]

    def _select(self, hidden: Tensor) -> None:
        if hidden.shape[-3:-1] != self.vision.shape or self.selection_inputs is not None:
            raise ValueError(
                f"expected one prefill of shape {tuple(self.vision.shape)}, got a call with "
                f"hidden states {tuple(hidden.shape)}"
            )
        if self.layer == 0:
            normed, keys = hidden, hidden.new_empty((hidden.shape[0], 0, hidden.shape[1], 1))
        else:
            normed, keys = final_norm(self.decoder)(hidden), self._ranking_keys()
        self.selection_inputs = SelectionInputs(normed, keys, self.vision, self.valid)
        if self.selector is None:
            keep = torch.arange(hidden.shape[-2]).expand(self.vision.shape)
        else:
            keep = self.selector(self.selection_inputs, self.retain)
        self.keep_idx = keep.to(hidden.device)
        self.prefilling = True

    def _ranking_keys(self) -> Tensor:
        if self.layer - 1 not in self.stored:
            raise ValueError(f"decoder layer {self.layer - 1} stores no keys to rank tokens by")
        keys = self.attended if self.latent_cache else self.stored[self.layer - 1][0]
        assert keys is not None
        return keys

    def between_layers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """DeepStack's addition of vision features to hidden states that are already pruned."""

        def add(hidden: Tensor, positions: Tensor, features: Tensor) -> Any:
            return original(hidden, *self._left(positions, features))

        return add

    def before_decoder(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the decoder: the same for a decoder that adds them in its own loop."""
        self._require_decode(args, kwargs)
        kwargs = kwargs | self._positions(kwargs)
        padding: Any = kwargs.get("attention_mask")
        known = self.uniform and isinstance(padding, Tensor) and padding.ndim == 2
        if known and self.keep_idx is not None:
            # Decode indexes the caches by the mask's first columns, so gather those likewise.
            prompt = self.valid.shape[1]
            columns = padding[:, :prompt].gather(1, self.keep_idx), padding[:, prompt:]
            return args, kwargs | {"attention_mask": torch.cat(columns, 1)}
        mask, features = kwargs.get("vision_mask"), kwargs.get("deepstack_features")
        if mask is None or features is None:
            return args, kwargs

        def left(index: int) -> tuple[Tensor, Tensor]:
            positions, rows = self._left(mask[..., 0], features[index])
            return positions[..., None], rows

        def rows_left(index: int) -> Tensor:
            return left(index)[1]

        first = next(iter(features))
        late = {
            "vision_mask": Late(lambda: left(first)[0]),
            "deepstack_features": {i: Late(partial(rows_left, i)) for i in features},
        }
        return args, kwargs | late

    def _require_decode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.keep_idx is None:
            return
        given = *args, kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        tokens = next((t.shape[1] for t in given if isinstance(t, Tensor)), 1)
        if tokens != 1:
            raise ValueError(f"expected decode steps after the prefill, got {tokens} tokens")

    def _positions(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positions [1, 1] of a decode step that would derive them from its caches' length."""
        cache, given = kwargs.get("past_key_values"), kwargs.get("position_ids")
        kept = self.keep_idx if self.uniform and not self.prefilling else None
        if kept is None or cache is None or given is not None:
            return {}
        dropped = self.valid.shape[1] - kept.shape[1]
        # Position tables that start after the pad's row are offset by it.
        table = getattr(self.decoder, "embed_positions", None)
        first = getattr(table, "padding_idx", -1) + 1 if hasattr(table, "make_weights") else 0
        return {"position_ids": kept.new_tensor([[first + cache.get_seq_length() + dropped]])}

    def _left(self, positions: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, S] and rows of vision features, reduced to those that were kept."""
        if self.selector is None or self.keep_idx is None:
            return positions, features
        row = positions.flatten().cumsum(0).view(positions.shape) - 1
        positions = take(positions, self.keep_idx, 1)
        return positions, features[take(row, self.keep_idx, 1)[positions]]

    def compact(self, cache: Any) -> None:
        """Keep only the kept tokens in the caches of the layers before K.

        A sliding-window layer shorter than the prompt holds its last tokens, whatever was dropped.
        """
        assert self.keep_idx is not None
        for index, (keys, values) in self.stored.items():
            entry = cache.layers[index]
            if entry.keys.shape[2] == keys.shape[2]:
                entry.keys = take(keys, self.keep_idx, 2)
                entry.values = take(values, self.keep_idx, 2)

    def end_prefill(self) -> None:
        """Let go of what only the prefill needs: decode steps pass the layers unchanged."""
        self.prefilling = False
        self.stored.clear()
        self._gathered.clear()


_CACHE_UPDATE = Cache.update


@contextmanager
def installed(hooks: Hooks, kv_layout: KvLayout) -> Iterator[None]:
    """Prune the first call of more than one token inside the ``with`` block.

    After it, only the decoder itself keeps hooks: for decode masks and positions.
    """
    hooks.uniform = kv_layout == "uniform"

    def after_decoder(_: Any, __: Any, output: Any) -> None:
        if not hooks.prefilling:
            return
        in_prefill.close()
        if hooks.selector is not None and hooks.uniform:
            hooks.compact(output.past_key_values)
        hooks.end_prefill()

    with torch.no_grad(), ExitStack() as stack:
        in_prefill = stack.enter_context(ExitStack())
        in_prefill.enter_context(_in_prefill(hooks))
        stack.callback(hooks.decoder.register_forward_hook(after_decoder).remove)
        before = hooks.decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True)
        stack.callback(before.remove)
        yield


@contextmanager
def _in_prefill(hooks: Hooks) -> Iterator[None]:
    """All that only a prefill needs."""
    recorder: Any = lambda *args, **kwargs: hooks.update(*args, **kwargs)  # noqa: E731
    with ExitStack() as stack:
        for index, layer in enumerate(hooks.decoder.layers[hooks.layer :], hooks.layer):
            hook: Any = lambda _, *inputs, index=index: hooks.before_layer(index, *inputs)  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        deepstack = getattr(hooks.decoder, "_deepstack_process", None)
        if deepstack is not None:
            hooks.decoder._deepstack_process = hooks.between_layers(deepstack)
            stack.callback(delattr, hooks.decoder, "_deepstack_process")
        stack.enter_context(replaced(Cache, "update", recorder))
        if hooks.latent_cache:
            layer = hooks.decoder.layers[max(hooks.layer - 1, 0)]
            stack.enter_context(attention_keys(layer, hooks.note_attended))
        yield
