"""DART by forward hooks on an eager Hugging Face model: what the compiled model is compared with.

Nothing here comes from dartfx. Before decoder layer K, every tensor argument of the decoder
layers is gathered along its token dimensions by ``keep_idx``, one row of indices per sample.
Positions and masks are gathered, never rebuilt: every token keeps the position it had, and a mask
made anew from positions with gaps would treat each gap as the border of another sequence.
Decode steps (one query token) pass through the hooks untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from oracle import select_batch
from torch import Tensor

KvLayout = Literal["layered", "uniform"]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """All that a selection may look at, taken before decoder layer K.

    ``hidden`` [B, S, C]: output of layer K-1 through the model's final norm.
    ``keys`` [B, H, S, D]: keys of layer K-1 after rotary embedding, as the cache holds them.
    ``vision`` and ``valid`` [B, S] bool: vision tokens; tokens that are not padding.
    """

    hidden: Tensor
    keys: Tensor
    vision: Tensor
    valid: Tensor


Selector = Callable[[Evidence, int], Tensor]
"""(evidence, retain) -> keep_idx [B, S'] int64, ascending in each row."""


@dataclass(frozen=True)
class Pruned:
    """A prefill. ``logits`` [B, S', V]; per layer ``keys``, ``values`` [B, H, S or S', D];
    ``keep_idx`` [B, S'] int64; ``hidden`` and ``score_keys`` are what the selection saw."""

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    keep_idx: Tensor
    hidden: Tensor
    score_keys: Tensor

    @property
    def kv_lengths(self) -> list[int]:
        """Cached tokens of each decoder layer."""
        return [key.shape[2] for key in self.keys]


@dataclass(frozen=True)
class Generated:
    """A greedy generation. ``token_ids`` [B, T] new tokens; ``logits`` [B, T, V], one per step;
    ``keep_idx`` [B, S']; ``kv_lengths`` of each decoder layer after the last step."""

    token_ids: Tensor
    logits: Tensor
    keep_idx: Tensor
    kv_lengths: list[int]


def take(tensor: Tensor, keep_idx: Tensor, dim: int) -> Tensor:
    """``tensor`` gathered along ``dim`` by each row's indices.

    tensor: [B or 1, ..., S, ...]; keep_idx: [B, S'].  Returns [B, ..., S', ...].
    """
    rows, kept = keep_idx.shape
    source = tensor.expand(rows, *tensor.shape[1:])
    shape = [1] * source.dim()
    shape[0], shape[dim] = rows, kept
    wanted = list(source.shape)
    wanted[dim] = kept
    return source.gather(dim, keep_idx.view(shape).expand(wanted))


def float64_selector(evidence: Evidence, retain: int) -> Tensor:
    """The canonical selection of the float64 oracle."""
    batch = select_batch(
        evidence.hidden, evidence.keys, evidence.vision.cpu(), retain, evidence.valid.cpu()
    )
    return torch.tensor(batch.keep_idx)


def _gather_argument(name: str, value: Any, keep_idx: Tensor) -> Any:
    """One keyword argument of a decoder layer, with only the kept tokens left in it.

    Dimensions go by the argument's name, never by its sizes, so equal sizes cannot mislead.
    """
    if name == "position_embeddings":
        return tuple(take(table, keep_idx, 1) for table in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask" and value.dim() == 4:
        return take(take(value, keep_idx, 2), keep_idx, 3)
    if name == "position_ids" and value.dim() == 2:
        return take(value, keep_idx, 1)
    raise TypeError(
        f"decoder layer got {name} of shape {tuple(value.shape)}, and it is not known which of "
        f"its dimensions are tokens; add it to hooked._gather_argument"
    )


class _Hooks:
    """The hooks of one call; ``selector`` None only watches."""

    def __init__(
        self, model: Any, inputs: Inputs, layer: int, retain: int, selector: Selector | None
    ) -> None:
        self.decoder = model.get_decoder()
        depth = len(self.decoder.layers)
        if not 1 <= layer < depth:
            raise ValueError(
                f"layer={layer}; a model of {depth} layers can be cut at 1..{depth - 1}"
            )
        ids = inputs["input_ids"]
        self.vision = ids == model.config.image_token_id
        self.valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.layer, self.retain, self.selector = layer, retain, selector
        self.evidence: Evidence | None = None
        self.keep_idx: Tensor | None = None
        self.prefilling = False

    def before_layer(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of decoder layer ``index`` >= K."""
        hidden = args[0]
        if len(args) != 1:
            raise TypeError(f"decoder layer {index} got {len(args)} positional arguments, not one")
        if hidden.shape[1] == 1:
            return args, kwargs
        if index == self.layer:
            self._select(hidden, kwargs["past_key_values"])
        if self.selector is None:
            return args, kwargs
        assert self.keep_idx is not None
        if index == self.layer:
            hidden = take(hidden, self.keep_idx, 1)
        gathered = {k: _gather_argument(k, v, self.keep_idx) for k, v in kwargs.items()}
        return (hidden,), gathered

    def _select(self, hidden: Tensor, cache: Any) -> None:
        if hidden.shape[:2] != self.vision.shape or self.evidence is not None:
            raise ValueError(
                f"expected one prefill of shape {tuple(self.vision.shape)}, got a call with "
                f"hidden states {tuple(hidden.shape)}"
            )
        keys = cache.layers[self.layer - 1].keys
        self.evidence = Evidence(self.decoder.norm(hidden), keys, self.vision, self.valid)
        everything = torch.arange(hidden.shape[1], device=hidden.device).expand(self.vision.shape)
        keep = everything if self.selector is None else self.selector(self.evidence, self.retain)
        self.keep_idx = keep.to(hidden.device)
        self.prefilling = True

    def compact(self, cache: Any) -> None:
        """Leave only the kept tokens in the caches of the layers before K."""
        assert self.keep_idx is not None
        for entry in cache.layers[: self.layer]:
            entry.keys = take(entry.keys, self.keep_idx, 2)
            entry.values = take(entry.values, self.keep_idx, 2)

    def require_all_pads_kept(self) -> None:
        """Refuse to decode when the mask's first columns would no longer fit the cache."""
        assert self.keep_idx is not None
        pads = (~self.valid).sum(1)
        kept = (~self.valid.gather(1, self.keep_idx)).sum(1)
        for row in (pads != kept).nonzero().flatten().tolist():
            raise ValueError(
                f"row {row} lost {int(pads[row] - kept[row])} of its pads: decoding would still "
                f"mask {int(pads[row])} columns, so valid tokens; give all rows as many images"
            )


@contextmanager
def _hooked(hooks: _Hooks, kv_layout: KvLayout, *, decoding: bool) -> Iterator[None]:
    def after_decoder(_: Any, __: Any, output: Any) -> None:
        if hooks.selector is None or not hooks.prefilling:
            return
        hooks.prefilling = False
        if decoding:
            hooks.require_all_pads_kept()
        if kv_layout == "uniform":
            hooks.compact(output.past_key_values)

    handles = [hooks.decoder.register_forward_hook(after_decoder)]
    for index, layer in enumerate(hooks.decoder.layers):
        if index >= hooks.layer:
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, index=index: hooks.before_layer(index, args, kwargs),
                    with_kwargs=True,
                )
            )
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: Any, inputs: Inputs, hooks: _Hooks, kv_layout: KvLayout) -> Pruned:
    with _hooked(hooks, kv_layout, decoding=False):
        output = model(**inputs, use_cache=True)
    if hooks.evidence is None or hooks.keep_idx is None:
        raise ValueError("the prompt never reached the hooks; it must have more than one token")
    layers = output.past_key_values.layers
    return Pruned(
        output.logits,
        [entry.keys for entry in layers],
        [entry.values for entry in layers],
        hooks.keep_idx,
        hooks.evidence.hidden,
        hooks.evidence.keys,
    )


def _generate(
    model: Any, inputs: Inputs, hooks: _Hooks, kv_layout: KvLayout, max_new_tokens: int
) -> Generated:
    with _hooked(hooks, kv_layout, decoding=True):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    if hooks.keep_idx is None:
        raise ValueError("the prompt never reached the hooks; it must have more than one token")
    prompt = inputs["input_ids"].shape[1]
    lengths = [entry.keys.shape[2] for entry in output.past_key_values.layers]
    logits = torch.stack(output.logits, dim=1)
    return Generated(output.sequences[:, prompt:], logits, hooks.keep_idx, lengths)


def pruned_forward(
    model: Any,
    inputs: Inputs,
    *,
    layer: int = 2,
    retain: int,
    kv_layout: KvLayout = "layered",
    selector: Selector = float64_selector,
) -> Pruned:
    """``model(**inputs)`` with DART before decoder layer ``layer``, 1 <= layer < depth.

    Layered caches keep S tokens before the cut and S' after it; uniform ones hold S' everywhere.
    Raises ValueError on a layer out of range.
    """
    hooks = _Hooks(model, inputs, layer, retain, selector)
    return _forward(model, inputs, hooks, kv_layout)


def pruned_generate(
    model: Any,
    inputs: Inputs,
    *,
    layer: int = 2,
    retain: int,
    max_new_tokens: int,
    kv_layout: KvLayout = "layered",
    selector: Selector = float64_selector,
) -> Generated:
    """Greedy ``model.generate(**inputs)`` whose prefill is pruned and whose decode is untouched.

    Raises ValueError where transformers' one decode mask cannot fit the caches: layered caches
    under padding or eager attention, and uniform ones when a row lost some of its pads.
    """
    hooks = _Hooks(model, inputs, layer, retain, selector)
    eager = hooks.decoder.config._attn_implementation == "eager"
    if kv_layout == "layered" and (eager or not bool(hooks.valid.all())):
        raise ValueError(
            "layered caches decode only without a mask, and padding or eager attention makes one "
            "of a single length for all layers; use kv_layout='uniform'"
        )
    return _generate(model, inputs, hooks, kv_layout, max_new_tokens)


def unpruned_forward(model: Any, inputs: Inputs, *, layer: int = 2) -> Pruned:
    """``model(**inputs)`` as it is; ``hidden`` and ``score_keys`` are taken before ``layer``."""
    return _forward(model, inputs, _Hooks(model, inputs, layer, 0, None), "layered")


def unpruned_generate(model: Any, inputs: Inputs, *, max_new_tokens: int) -> Generated:
    """Greedy ``model.generate(**inputs)`` as it is."""
    return _generate(model, inputs, _Hooks(model, inputs, 1, 0, None), "layered", max_new_tokens)
