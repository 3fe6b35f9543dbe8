"""DART by forward hooks on an eager Hugging Face model: the reference for the compiled model.

Nothing here uses the compiler. Before decoder layer K, every tensor argument of the decoder layers
is gathered along its token dimensions by ``keep_idx``, one row of indices per sample.
Positions and masks are gathered, never rebuilt: every token keeps its position, and a mask built
from positions with gaps would treat each gap as a sequence boundary.
Decode steps (one query token) pass through the hooks unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dartfx.tools.zoo.gather import take
from dartfx.tools.zoo.hooks import Hooks, Inputs, KvLayout, SelectionInputs, Selector, installed
from dartfx.tools.zoo.oracle import select_batch

__all__ = [
    "Generated",
    "Inputs",
    "KvLayout",
    "Pruned",
    "SelectionInputs",
    "Selector",
    "float64_selector",
    "pruned_forward",
    "pruned_generate",
    "take",
    "unpruned_forward",
    "unpruned_generate",
]

# Names kept for programs written before the hooks had their own file.
_Hooks, _hooked = Hooks, installed


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


def float64_selector(selection_inputs: SelectionInputs, retain: int) -> Tensor:
    """The canonical selection of the float64 oracle."""
    batch = select_batch(
        selection_inputs.hidden,
        selection_inputs.keys,
        selection_inputs.vision.cpu(),
        retain,
        selection_inputs.valid.cpu(),
    )
    return torch.tensor(batch.keep_idx)


def _attention_caches(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys; empty if the model returns no cache."""
    layers = [] if cache is None else cache.layers
    return [entry for entry in layers if getattr(entry, "keys", None) is not None]


def _forward(model: Any, inputs: Inputs, hooks: Hooks, kv_layout: KvLayout) -> Pruned:
    with installed(hooks, kv_layout):
        output = model(**inputs, use_cache=True)
    if hooks.selection_inputs is None or hooks.keep_idx is None:
        raise ValueError("the prompt never reached the hooks; it must have more than one token")
    layers = _attention_caches(getattr(output, "past_key_values", None))
    return Pruned(
        output.logits,
        [entry.keys for entry in layers],
        [entry.values for entry in layers],
        hooks.keep_idx,
        hooks.selection_inputs.hidden,
        hooks.selection_inputs.keys,
    )


def _generate(
    model: Any, inputs: Inputs, hooks: Hooks, kv_layout: KvLayout, max_new_tokens: int
) -> Generated:
    with installed(hooks, kv_layout):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    if hooks.keep_idx is None:
        raise ValueError("the prompt never reached the hooks; it must have more than one token")
    lengths = [entry.keys.shape[2] for entry in _attention_caches(output.past_key_values)]
    logits = torch.stack(output.logits, dim=1)
    return Generated(output.sequences[:, -max_new_tokens:], logits, hooks.keep_idx, lengths)


def pruned_forward(
    model: Any,
    inputs: Inputs,
    *,
    layer: int = 2,
    retain: int,
    kv_layout: KvLayout = "layered",
    selector: Selector = float64_selector,
    **where: Any,
) -> Pruned:
    """Run ``model(**inputs)`` with DART before decoder layer ``layer``, 0 <= layer < depth.

    Layered caches keep S tokens before the cut and S' after it; uniform ones hold S' everywhere.
    where: ``decoder`` (module) and ``image_token_id`` for models that do not expose them;
    ``latent_cache=True`` if the cache does not hold the keys that attention uses; ``merge=True``
    averages dropped tokens into the kept ones.
    Raises ValueError if the layer is out of range.
    """
    hooks = Hooks(model, inputs, layer, retain, selector, **where)
    return _forward(model, inputs, hooks, kv_layout)


def pruned_generate(
    model: Any,
    inputs: Inputs,
    *,
    layer: int = 2,
    retain: int,
    max_new_tokens: int,
    kv_layout: KvLayout = "uniform",
    selector: Selector = float64_selector,
    **where: Any,
) -> Generated:
    """Run greedy ``model.generate(**inputs)`` with a pruned prefill and unchanged decode.

    The caches are those of :func:`dartfx.compile`; a bare ``torch.compile`` leaves "layered" ones.
    Raises ValueError if transformers' single decode mask cannot fit the caches: layered caches with
    padding or eager attention.
    """
    hooks = Hooks(model, inputs, layer, retain, selector, **where)
    eager = hooks.decoder.config._attn_implementation == "eager"
    if kv_layout == "layered" and (eager or not bool(hooks.valid.all())):
        raise ValueError(
            "layered caches decode only without a mask, and padding or eager attention makes one "
            "of a single length for all layers; use kv_layout='uniform'"
        )
    return _generate(model, inputs, hooks, kv_layout, max_new_tokens)


def unpruned_forward(model: Any, inputs: Inputs, *, layer: int = 2) -> Pruned:
    """Run ``model(**inputs)`` unpruned; ``hidden``, ``score_keys`` are those before ``layer``."""
    return _forward(model, inputs, Hooks(model, inputs, layer, 0, None), "layered")


def unpruned_generate(model: Any, inputs: Inputs, *, max_new_tokens: int) -> Generated:
    """Run greedy ``model.generate(**inputs)`` unpruned."""
    return _generate(model, inputs, Hooks(model, inputs, 1, 0, None), "layered", max_new_tokens)
