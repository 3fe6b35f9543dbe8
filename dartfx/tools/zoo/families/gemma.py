"""The Gemma line: heads wider than their share, soft caps, and image blocks that see both ways."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from dartfx.tools.zoo.families.llava import siglip
from dartfx.tools.zoo.family import Inputs, Structure, images, special, text_sizes, tower_sizes


def _paligemma(decoder: Any, sizes: dict[str, Any], attention: str = "") -> Structure:
    image = special(sizes["vocab_size"], 1)
    config = hf.PaliGemmaConfig(
        vision_config=siglip(56).to_dict(),
        text_config=decoder.to_dict(),
        image_token_index=image,
        projection_dim=sizes["hidden_size"],
        hidden_size=sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
    )
    return Structure(
        "PaliGemmaForConditionalGeneration",
        config,
        image,
        16,
        images(3, 56, 56),
        extra=lambda ids, mask: {"token_type_ids": torch.zeros_like(ids)},
        attention=attention,
    )


def _tied(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**text_sizes(**text), "tie_word_embeddings": True, "head_dim": 16, **more}


def paligemma(**text: Any) -> Structure:
    """PaliGemma: the whole prompt sees itself both ways (prefix mask); one KV head."""
    sizes = _tied({"num_key_value_heads": 1, **text})
    return _paligemma(hf.GemmaConfig(**sizes), sizes)


def paligemma2(**text: Any) -> Structure:
    """PaliGemma 2: Gemma 2 decoder, soft-capped scores and every other layer a sliding window."""
    sizes = _tied(text, sliding_window=13)
    return _paligemma(hf.Gemma2Config(**sizes), sizes, "eager")


def gemma3(**text: Any) -> Structure:
    """Gemma 3: sliding and full layers with separate rotary tables, images see both ways."""
    text = {"layers": 6, "sliding_window": 13, **text}
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * text["layers"]
    sizes = _tied(text, layer_types=layers[: text["layers"]])
    image, start, end = (special(sizes["vocab_size"], n) for n in (1, 3, 4))
    config = hf.Gemma3Config(
        vision_config=siglip(112).to_dict(),
        text_config=hf.Gemma3TextConfig(**sizes),
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=end,
        mm_tokens_per_image=16,
    )
    return Structure(
        "Gemma3ForConditionalGeneration",
        config,
        image,
        16,
        images(3, 112, 112),
        image_prefix=(start,),
        image_suffix=(end,),
        types="token_type_ids",
    )


def gemma4(**text: Any) -> Structure:
    """Gemma 4: an input per layer and token, and last layers that share earlier layers' keys."""
    vocab = text.get("vocab_size", 200)
    sizes = _tied(
        {"layers": 6, **text},
        global_head_dim=16,
        vocab_size_per_layer_input=vocab,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=13,
        layer_types=["sliding_attention", "full_attention"] * 3,
        use_bidirectional_attention="vision",
    )
    image, video, start, end, audio = (special(vocab, n) for n in range(1, 6))
    tower = tower_sizes(
        num_key_value_heads=4,
        head_dim=12,
        patch_size=4,
        position_embedding_size=64,
        pooling_kernel_size=2,
    )
    config = hf.Gemma4Config(
        text_config=sizes,
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        boi_token_id=start,
        eoi_token_id=end,
        audio_token_id=audio,
    )

    name = "Gemma4ForConditionalGeneration"
    return _with_positions(name, config, 8, start, end)


def gemma4_unified(**text: Any) -> Structure:
    """Gemma 4 without towers: patches of pixels are embedded by one layer."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sizes = _tied(
        {"layers": 6, **text},
        global_head_dim=16,
        sliding_window=13,
        layer_types=layers,
        use_bidirectional_attention="vision",
    )
    image, video, start, end, audio = (special(sizes["vocab_size"], n) for n in range(1, 6))
    embedder = {
        "patch_size": 4,
        "pooling_kernel_size": 1,
        "mm_embed_dim": 48,
        "mm_posemb_size": 64,
        "output_proj_dims": 48,
    }
    config = hf.Gemma4UnifiedConfig(
        text_config=sizes,
        vision_config=embedder,
        audio_config=None,
        image_token_id=image,
        video_token_id=video,
        boi_token_id=start,
        eoi_token_id=end,
        audio_token_id=audio,
    )

    name = "Gemma4UnifiedForConditionalGeneration"
    return _with_positions(name, config, 4, start, end)


def _with_positions(name: str, config: Any, side: int, start: int, end: int) -> Structure:
    """A model of images cut into ``side`` by ``side`` patches, each with its position."""

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        axis = torch.arange(side)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)
        return {
            "pixel_values": torch.randn((count, side * side, 48), generator=generator),
            "image_position_ids": grid.repeat(count, 1, 1),
        }

    return Structure(
        name,
        config,
        config.image_token_id,
        16,
        pixels,
        image_prefix=(start,),
        image_suffix=(end,),
        types="mm_token_type_ids",
    )
