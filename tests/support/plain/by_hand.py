"""A decoder pruned by hand: layers written out, without a cache, from embeddings to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.hooked import Inputs, KvLayout, SelectionInputs, float64_selector, take
from tests.support.tolerances import RETAIN


def decoder_inputs(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, S, C] with the images merged in, and the rotary tables cos and sin."""
    seen: list[Any] = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: seen.extend([args[0], *kwargs["position_embeddings"]]),
            with_kwargs=True,
        )
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0], seen[1], seen[2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def layer_by_hand(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """One decoder layer with plain softmax attention -> (hidden, keys after rotary)."""
    attention = layer.self_attn
    rows, tokens = hidden.shape[:2]
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).view(rows, tokens, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * attention.head_dim**-0.5
    weights = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min).softmax(-1)
    mixed = weights @ value.repeat_interleave(group, 1)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key


def prune_by_hand(
    fam: Family, inputs: Inputs, prompt: int, *, layer: int, kv_layout: KvLayout
) -> tuple[Tensor, Tensor, SelectionInputs]:
    """Logits [B, S' + T, V], keep_idx [B, S'] and what it was selected from; S prompt and T tokens.

    No cache: the whole sequence runs through the first ``layer`` layers, is sliced, and runs
    through the rest. Decoded tokens are never dropped. Under uniform caches they see only the
    kept tokens in the first layers too.
    """
    model, decoder = fam.model, fam.model.get_decoder()
    hidden, cos, sin = decoder_inputs(model, inputs)
    rows, total = hidden.shape[:2]
    cos, sin = cos.expand(rows, -1, -1), sin.expand(rows, -1, -1)
    vision = inputs["input_ids"] == fam.image_token_id
    valid = inputs["attention_mask"].bool()
    causal = torch.ones(total, total, dtype=torch.bool).tril() & valid[:, None]

    def first_layers(embeds: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        for block in decoder.layers[:layer]:
            embeds, keys = layer_by_hand(block, embeds, cos, sin, allowed)
        return embeds, keys

    with torch.no_grad():
        cut, keys = first_layers(hidden, causal)
        normed = decoder.norm(cut)[:, :prompt]
        selection_inputs = SelectionInputs(
            normed, keys[:, :, :prompt], vision[:, :prompt], valid[:, :prompt]
        )
        keep = float64_selector(selection_inputs, RETAIN)
        keep_all = torch.cat([keep, torch.arange(prompt, total).expand(rows, -1)], 1)
        if kv_layout == "uniform":
            left = torch.zeros_like(valid).scatter(1, keep_all, True)
            decoding = torch.arange(total) >= prompt
            cut, _ = first_layers(hidden, causal & (left[:, None] | ~decoding[None, :, None]))
        hidden, cos, sin = (take(x, keep_all, 1) for x in (cut, cos, sin))
        causal = take(take(causal, keep_all, 1), keep_all, 2)
        for block in decoder.layers[layer:]:
            hidden, _ = layer_by_hand(block, hidden, cos, sin, causal)
        return model.lm_head(decoder.norm(hidden)), keep, selection_inputs
