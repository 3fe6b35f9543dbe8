"""Hooks that prune one call of an eager model, or only observe it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from dartfx.tools.zoo.gather import Late, gather_argument, take, take_tokens
from dartfx.tools.zoo.merging import merged

__all__ = ["Hooks", "Inputs", "KvLayout", "SelectionInputs", "Selector", "installed"]

KvLayout = Literal["layered", "uniform"]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class SelectionInputs:
    """All inputs of a selection, taken before decoder layer K.

    ``hidden`` [B, S, C]: layer K's input after the model's final norm.
    ``keys`` [B, H, S, D]: keys of layer K-1 after rotary embedding, as stored in the cache, or as
    used by attention if the cache holds something else.  Before layer 0, ``hidden`` are the
    embeddings themselves and ``keys`` have no heads.
    ``vision`` and ``valid`` [B, S] bool: vision tokens; tokens that are not padding.
    """

    hidden: Tensor
    keys: Tensor
    vision: Tensor
    valid: Tensor


Selector = Callable[[SelectionInputs, int], Tensor]
"""(selection_inputs, retain) -> keep_idx [B, S'] int64, ascending in each row."""


class Hooks:
    """The hooks of one call; ``selector`` None only observes."""

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
    ) -> None:
        self.decoder = model.get_decoder() if decoder is None else decoder
        depth = len(self.decoder.layers)
        if not 0 <= layer < depth:
            raise ValueError(
                f"layer={layer}; a model of {depth} layers can be cut at 0..{depth - 1}"
            )
        ids = inputs["input_ids"]
        self.vision = ids == (
            model.config.image_token_id if image_token_id is None else image_token_id
        )
        self.valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.layer, self.retain, self.selector = layer, retain, selector
        self.selection_inputs: SelectionInputs | None = None
        self.keep_idx: Tensor | None = None
        self.prefilling = False
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.latent_cache, self.merge = latent_cache, merge
        self.uniform = False
        self.attended: Tensor | None = None

    def update(self, cache: Cache, keys: Tensor, values: Tensor, index: int, *more: Any) -> Any:
        """Replacement for ``Cache.update`` that records the prompt KV stored before layer K.

        The cache itself may hold less afterwards, if a layer's window is short.
        """
        if index < self.layer and self.selection_inputs is None:
            self.stored[index] = keys, values
        return _CACHE_UPDATE(cache, keys, values, index, *more)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Record the keys that layer K-1 passes to its attention call."""
        attend = torch.nn.functional.scaled_dot_product_attention
        inside = False

        def enter(*_: Any) -> None:
            nonlocal inside
            inside = self.selection_inputs is None

        def leave(*_: Any) -> None:
            nonlocal inside
            inside = False

        def recorder(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if inside:
                self.attended = key
            return attend(query, key, *args, **kwargs)

        layer = self.decoder.layers[max(self.layer - 1, 0)]
        handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            with _replaced(torch.nn.functional, "scaled_dot_product_attention", recorder):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def before_layer(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of decoder layer ``index`` >= K."""
        names = list(inspect.signature(self.decoder.layers[index].forward).parameters)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        hidden = kwargs.pop(names[0])
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
            k: gather_argument(k, v, self.keep_idx, tokens == 1)
            for k, v in kwargs.items()
            if k != "past_key_values"
        }
        return (hidden,), kwargs | gathered

    def _select(self, hidden: Tensor) -> None:
        if hidden.shape[-3:-1] != self.vision.shape or self.selection_inputs is not None:
            raise ValueError(
                f"expected one prefill of shape {tuple(self.vision.shape)}, got a call with "
                f"hidden states {tuple(hidden.shape)}"
            )
        if self.layer == 0:
            normed, keys = hidden, hidden.new_empty((hidden.shape[0], 0, hidden.shape[1], 1))
        else:
            normed, keys = _final_norm(self.decoder)(hidden), self._ranking_keys()
        self.selection_inputs = SelectionInputs(normed, keys, self.vision, self.valid)
        everything = torch.arange(hidden.shape[-2], device=hidden.device).expand(self.vision.shape)
        keep = (
            everything
            if self.selector is None
            else self.selector(self.selection_inputs, self.retain)
        )
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


_CACHE_UPDATE = Cache.update


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute that hooks cannot reach, inside the ``with`` block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _final_norm(decoder: Any) -> Any:
    names = "norm final_layernorm final_layer_norm embedding_norm norm_f layer_norm"
    for name in names.split():
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise TypeError(f"no final norm known for {type(decoder).__name__}; add it to _final_norm")


@contextmanager
def installed(hooks: Hooks, kv_layout: KvLayout) -> Iterator[None]:
    hooks.uniform = kv_layout == "uniform"

    def after_decoder(_: Any, __: Any, output: Any) -> None:
        pruned = hooks.prefilling and hooks.selector is not None
        hooks.prefilling = False
        if pruned and hooks.uniform:
            hooks.compact(output.past_key_values)

    handles = [
        hooks.decoder.register_forward_hook(after_decoder),
        hooks.decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True),
    ]
    for index, layer in enumerate(hooks.decoder.layers):
        if index >= hooks.layer:
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: hooks.before_layer(index, args, kwargs),
                    with_kwargs=True,
                )
            )
    deepstack = getattr(hooks.decoder, "_deepstack_process", None)
    if deepstack is not None:
        hooks.decoder._deepstack_process = hooks.between_layers(deepstack)
    recorder: Any = lambda *args, **kwargs: hooks.update(*args, **kwargs)  # noqa: E731
    try:
        with torch.no_grad(), _replaced(Cache, "update", recorder), hooks.attending():
            yield
    finally:
        for handle in handles:
            handle.remove()
        if deepstack is not None:
            del hooks.decoder._deepstack_process
