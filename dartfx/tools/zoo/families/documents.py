"""Families that read documents, and the last MiniCPM-V: slices, SAM towers, learned queries."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from dartfx.tools.zoo.families.qwen import hybrid_sizes, interleaved
from dartfx.tools.zoo.family import Inputs, Structure, images, special, text_sizes, tower_sizes


def _slices(side: int, size: int) -> Any:
    """Patches of images of ``side`` x ``side`` patches, ``size`` pixels wide, as one long strip."""

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        strip = torch.randn((1, 3, size, size * side * side * count), generator=generator)
        return {"pixel_values": strip, "target_sizes": torch.tensor([[side, side]] * count)}

    return pixels


def minicpm_ocr(**text: Any) -> Structure:
    """MiniCPM-OCR: MiniCPM-V 4.6 with four times the vision tokens, hybrid Qwen3.5 decoder."""
    sizes = {**hybrid_sizes(**text), "head_dim": 16}
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    config = hf.MiniCPMOcrConfig(
        vision_config=tower_sizes(image_size=64, patch_size=8, insert_layer_id=1),
        text_config=hf.Qwen3_5TextConfig(**sizes),
        image_token_id=image,
        video_token_id=video,
        insert_layer_id=1,
        tie_word_embeddings=False,
    )
    name = "MiniCPMOcrForConditionalGeneration"
    return Structure(name, config, image, 16, _slices(8, 8), layer=3)


def minicpmv4_7(**text: Any) -> Structure:
    """MiniCPM-V 4.7: M-RoPE on one canvas for an image and its slices, hybrid Qwen3.5 decoder."""
    sizes = interleaved(hybrid_sizes(**text), 0.5)
    vocab = sizes["vocab_size"]
    image, video, start, end = (special(vocab, n) for n in range(1, 5))
    markers = ("slice_start_id", "slice_end_id", "newline_id")
    config = hf.MiniCPMV4_7Config(
        vision_config=tower_sizes(image_size=128, patch_size=8, insert_layer_id=1),
        text_config=hf.Qwen3_5TextConfig(**sizes),
        image_token_id=image,
        video_token_id=video,
        image_start_id=start,
        image_end_id=end,
        insert_layer_id=1,
        image_size=128,
        **{name: special(vocab, n) for n, name in enumerate(markers, 5)},
    )
    return Structure(
        "MiniCPMV4_7ForConditionalGeneration",
        config,
        image,
        16,
        _slices(16, 8),
        image_prefix=(start,),
        image_suffix=(end,),
        layer=3,
        types="mm_token_type_ids",
    )


def _sam(output: int, **more: Any) -> dict[str, Any]:
    """A SAM tower of 16 x 16 patches whose neck halves the grid twice."""
    return {
        "hidden_size": 48,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 96,
        "downsample_channels": [24, output],
        **more,
    }


def _routed() -> dict[str, Any]:
    return {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    }


def deepseek_ocr2(**text: Any) -> Structure:
    """DeepSeek-OCR 2: 144 learned queries read a SAM tower in order, then a newline; MoE."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    reader = {**tower_sizes(2), "hidden_size": 48, "num_key_value_heads": 2, "vocab_size": 32}
    layers = ["dense"] + ["sparse"] * (sizes["num_hidden_layers"] - 1)
    config = hf.DeepseekOcr2Config(
        vision_config={"sam_config": _sam(48), "encoder_config": reader},
        text_config={**sizes, **_routed(), "mlp_layer_types": layers},
        image_token_id=image,
    )
    name = "DeepseekOcr2ForConditionalGeneration"
    return Structure(name, config, image, 145, images(3, 128, 128))


def unlimited_ocr(**text: Any) -> Structure:
    """Unlimited-OCR: SAM and CLIP towers, a sliding window over what is written only."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    clip = tower_sizes(2, image_size=128, patch_size=32)
    config = hf.UnlimitedOcrConfig(
        vision_config={"sam_config": _sam(48), "encoder_config": clip},
        text_config={**sizes, **_routed(), "sliding_window": 5},
        image_token_id=image,
    )
    name = "UnlimitedOcrForConditionalGeneration"
    return Structure(name, config, image, 21, images(3, 128, 128))
