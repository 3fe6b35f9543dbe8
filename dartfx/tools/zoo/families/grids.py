"""More families that take images as grids of flattened patches, as the Qwen-VL line does."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from dartfx.tools.zoo.families.qwen import (
    deepstack_tower,
    glm_tower,
    interleaved,
    mrope,
    structure,
    tokens,
    window_tower,
)
from dartfx.tools.zoo.family import (
    Inputs,
    Pixels,
    Structure,
    patches,
    special,
    text_sizes,
    tower_sizes,
)


def _audio() -> dict[str, Any]:
    return {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "output_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 32,
        "downsample_hidden_size": 16,
    }


def qwen2_5_omni(**text: Any) -> Structure:
    """Qwen2.5-Omni's thinker: M-RoPE over image, video and sound; here an image."""
    sizes = {**mrope(text_sizes(**text)), "use_sliding_window": False}
    vocab = sizes["vocab_size"]
    audio = {k: v for k, v in _audio().items() if not k.startswith("downsample")}
    config = hf.Qwen2_5OmniThinkerConfig(
        vision_config=window_tower(sizes["hidden_size"]),
        text_config=sizes,
        audio_config=audio,
        image_token_index=special(vocab, 1),
        video_token_index=special(vocab, 2),
        audio_token_index=special(vocab, 5),
        vision_start_token_id=special(vocab, 3),
        vision_end_token_id=special(vocab, 4),
        audio_start_token_id=special(vocab, 6),
        audio_end_token_id=special(vocab, 7),
    )
    name = "Qwen2_5OmniThinkerForConditionalGeneration"
    return structure(name, config, vocab, types="")


def qwen3_omni_moe(**text: Any) -> Structure:
    """Qwen3-Omni's thinker: DeepStack and experts."""
    sizes = interleaved(
        text_sizes(
            **{"layers": 5, **text},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
        )
    )
    vocab = sizes["vocab_size"]
    config = hf.Qwen3OmniMoeThinkerConfig(
        vision_config=deepstack_tower(sizes["hidden_size"]),
        text_config=sizes,
        audio_config=_audio(),
        image_token_id=special(vocab, 1),
        video_token_id=special(vocab, 2),
        audio_token_id=special(vocab, 5),
        vision_start_token_id=special(vocab, 3),
        vision_end_token_id=special(vocab, 4),
        audio_start_token_id=special(vocab, 6),
        audio_end_token_id=special(vocab, 7),
    )
    name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    return structure(name, config, vocab, patch=16, types="")


def video_llama_3(**text: Any) -> Structure:
    """VideoLLaMA 3: any image size, plain rotary positions in the text."""
    sizes = text_sizes(**text)
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    tower = tower_sizes(patch_size=14)
    config = hf.VideoLlama3Config(
        vision_config=tower,
        text_config=hf.Qwen2Config(**sizes),
        image_token_id=image,
        video_token_id=video,
    )
    pixels = patches(64, 3 * 14 * 14, image_grid_thw=[1, 8, 8], image_merge_sizes=[2])

    def merged(count: int, generator: torch.Generator) -> Inputs:
        inputs = pixels(count, generator)
        inputs["image_merge_sizes"] = inputs["image_merge_sizes"].flatten()
        return inputs

    return Structure("VideoLlama3ForConditionalGeneration", config, image, 16, merged)


def _squares(patch: int, grid: int) -> Pixels:
    def pixels(count: int, generator: torch.Generator) -> Inputs:
        cut = torch.randn((count * grid * grid, 3, patch, patch), generator=generator)
        return {"pixel_values": cut, "image_grid_thw": torch.tensor([[1, grid, grid]] * count)}

    return pixels


def paddleocr_vl(**text: Any) -> Structure:
    """PaddleOCR-VL: Ernie 4.5 decoder with M-RoPE, tied weights."""
    sizes = mrope({**text_sizes(**text), "tie_word_embeddings": True, "head_dim": 16})
    vocab = sizes["vocab_size"]
    tower = tower_sizes(image_size=112, patch_size=14)
    config = hf.PaddleOCRVLConfig(vision_config=tower, text_config=sizes, **tokens(vocab))
    name = "PaddleOCRVLForConditionalGeneration"
    return structure(name, config, vocab, pixels=_squares(14, 8))


def ernie4_5_vl_moe(**text: Any) -> Structure:
    """Ernie 4.5 VL: separate experts for text and for vision tokens."""
    sizes = mrope(text_sizes(**text))
    sizes["rope_parameters"]["mrope_section"] = [3, 3, 2]  # height and width alternate here
    vocab = sizes["vocab_size"]
    layers = sizes["num_hidden_layers"]
    sizes |= {
        "moe_intermediate_size": [48, 32],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
    }
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    more = ("video_start_token_id", "video_end_token_id")
    tower = {
        "depth": 3,
        "hidden_size": 48,
        "num_heads": 4,
        "intermediate_size": 96,
        "patch_size": 14,
    }
    config = hf.Ernie4_5_VLMoeConfig(
        vision_config=tower,
        text_config=sizes,
        **{name: special(vocab, n) for n, name in enumerate(names + more, 1)},
    )
    pixels = patches(64, 3 * 14 * 14, image_grid_thw=[1, 8, 8])

    def kinds(ids: Tensor, mask: Tensor) -> Inputs:
        return {"moe_mm_token_type_ids": (ids == special(vocab, 1)).int()}

    name = "Ernie4_5_VLMoeForConditionalGeneration"
    return structure(name, config, vocab, pixels=pixels, extra=kinds)


def glm_ocr(**text: Any) -> Structure:
    """GLM-OCR: GLM-4V's layout with attention biases and norms in the tower."""
    sizes = mrope({**text_sizes(**text), "head_dim": 16})
    vocab = sizes["vocab_size"]
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    more = ("video_start_token_id", "video_end_token_id")
    config = hf.GlmOcrConfig(
        vision_config=glm_tower(sizes["hidden_size"]),
        text_config=sizes,
        **{name: special(vocab, n) for n, name in enumerate(names + more, 1)},
    )
    return structure("GlmOcrForConditionalGeneration", config, vocab)


def exaone4_5(**text: Any) -> Structure:
    """EXAONE 4.5: norms behind each block, sliding layers with rotary and full ones without."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    decoder = hf.Exaone4Config(
        **sizes,
        sliding_window=13,
        sliding_window_pattern="LLLG",
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    tower = {**window_tower(sizes["hidden_size"]), "num_key_value_heads": 2}
    config = hf.Exaone4_5_Config(
        vision_config=tower,
        text_config=decoder,
        image_token_id=special(vocab, 1),
        video_token_id=special(vocab, 2),
    )
    return structure("Exaone4_5_ForConditionalGeneration", config, vocab, types="")


def hyperclovax_vision_v2(**text: Any) -> Structure:
    """HyperCLOVA X Vision: Qwen2.5-VL's tower before a decoder with scaled residuals."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    config = hf.HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision", **window_tower(sizes["hidden_size"])},
        text_config={"model_type": "hyperclovax", **sizes},
        image_token_id=special(vocab, 1),
        video_token_id=special(vocab, 2),
        tie_word_embeddings=False,
    )
    name = "HyperCLOVAXVisionV2ForConditionalGeneration"
    return structure(name, config, vocab, types="")


def cohere_compass(**text: Any) -> Structure:
    """Cohere Compass: parallel blocks, sliding layers, and DeepStack."""
    sizes = text_sizes(**{"layers": 5, **text})
    vocab = sizes["vocab_size"]
    layers = ["sliding_attention"] * 3 + ["full_attention"] * 2
    rope = mrope(sizes)["rope_parameters"]
    decoder = {
        **sizes,
        "sliding_window": 13,
        "layer_types": layers,
        "rope_parameters": {"sliding_attention": rope, "full_attention": None},
    }
    config = hf.CohereCompassConfig(
        vision_config=deepstack_tower(sizes["hidden_size"]), text_config=decoder, **tokens(vocab)
    )
    return structure("CohereCompassForConditionalGeneration", config, vocab, patch=16)


def hunyuan_vl(**text: Any) -> Structure:
    """HunYuan-VL: positions on four axes, a newline token behind every row of the grid."""
    sizes = {**text_sizes(**text), "head_dim": 16}
    vocab, hidden = sizes["vocab_size"], sizes["hidden_size"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
    tower = tower_sizes(
        num_key_value_heads=4,
        out_hidden_size=hidden,
        text_hidden_size=hidden,
        patch_size=14,
        max_image_size=112,
    )
    config = hf.HunYuanVLConfig(
        vision_config=tower,
        text_config={**sizes, "rope_parameters": rope},
        image_token_id=special(vocab, 1),
        tie_word_embeddings=False,
        im_start_id=special(vocab, 3),
        im_end_id=special(vocab, 4),
        im_newline_id=special(vocab, 5),
    )
    pixels = patches(64, 3 * 14 * 14, image_grid_thw=[1, 8, 8])
    return Structure(
        "HunYuanVLForConditionalGeneration",
        config,
        special(vocab, 1),
        22,
        pixels,
        types="mm_token_type_ids",
    )
