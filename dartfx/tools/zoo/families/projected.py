"""More families whose tower's features pass a projector and replace placeholder tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from dartfx.tools.zoo.families.llava import clip, pixtral, siglip
from dartfx.tools.zoo.family import Inputs, Structure, images, special, text_sizes, tower_sizes


def _sam(output: int, **more: Any) -> dict[str, Any]:
    """A SAM tower: window attention, relative positions, a convolutional neck."""
    return {
        **tower_sizes(image_size=64, patch_size=8),
        "output_channels": output,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 96,
        **more,
    }


def cohere2_vision(**text: Any) -> Structure:
    """Command A Vision: Cohere2 decoder, pixels shuffled into a gated projector."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(112),
        text_config=hf.Cohere2Config(**sizes, sliding_window=13, layer_types=layers),
        image_token_id=image,
        alignment_intermediate_size=96,
    )
    name = "Cohere2VisionForConditionalGeneration"
    return Structure(name, config, image, 16, images(3, 112, 112))


def aria(**text: Any) -> Structure:
    """Aria: an MoE decoder with shared experts, images cross-attended into a fixed query count."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = {"model_type": "idefics3_vision", **tower_sizes(image_size=56, patch_size=14)}
    decoder = {
        "model_type": "aria_text",
        **sizes,
        "intermediate_size": 48,
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }
    config = hf.AriaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=image,
        projector_patch_to_query_dict={16: 12},
    )
    return Structure("AriaForConditionalGeneration", config, image, 12, images(3, 56, 56))


def deepseek_vl(**text: Any) -> Structure:
    """DeepSeek-VL: SigLIP tower, Llama decoder."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.DeepseekVLConfig(
        vision_config=siglip(56),
        text_config=hf.LlamaConfig(**sizes),
        image_token_id=image,
        tie_word_embeddings=False,
    )
    return Structure("DeepseekVLForConditionalGeneration", config, image, 16, images(3, 56, 56))


def janus(**text: Any) -> Structure:
    """Janus: one tower to read images and a tokeniser to write them; only the first is used."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    hidden = sizes["hidden_size"]
    writer = {
        "embed_dim": 4,
        "num_embeddings": 32,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": hidden,
        "image_token_embed_dim": hidden,
        "num_patches": 4,
    }
    tower = tower_sizes(image_size=64, patch_size=16, projection_dim=hidden, num_image_tokens=16)
    config = hf.JanusConfig(
        vision_config={k: v for k, v in tower.items() if k != "intermediate_size"},
        text_config=hf.LlamaConfig(**sizes),
        vq_config=writer,
        image_token_id=image,
        tie_word_embeddings=False,
    )
    return Structure("JanusForConditionalGeneration", config, image, 16, images(3, 64, 64))


def idefics2(**text: Any) -> Structure:
    """Idefics2: a perceiver squeezes every image into a fixed number of latents."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    hidden = sizes["hidden_size"]
    config = hf.Idefics2Config(
        vision_config=tower_sizes(image_size=56, patch_size=14),
        perceiver_config={
            "hidden_size": hidden,
            "resampler_n_latents": 12,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        text_config=hf.MistralConfig(**sizes, sliding_window=None, head_dim=16),
        image_token_id=image,
    )
    name = "Idefics2ForConditionalGeneration"
    return Structure(name, config, image, 12, images(3, 56, 56), per_row=True)


def got_ocr2(**text: Any) -> Structure:
    """GOT-OCR2: a SAM tower whose neck halves the grid twice; tied weights."""
    sizes = {**text_sizes(**text), "tie_word_embeddings": True}
    image = special(sizes["vocab_size"], 1)
    config = hf.GotOcr2Config(
        vision_config=_sam(24, image_size=128),
        text_config=hf.Qwen2Config(**sizes),
        image_token_index=image,
    )
    return Structure("GotOcr2ForConditionalGeneration", config, image, 16, images(3, 128, 128))


def lighton_ocr(**text: Any) -> Structure:
    """LightOnOCR: Pixtral tower, patches merged 2 x 2, Qwen3 decoder with norms on heads."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.LightOnOcrConfig(
        vision_config=pixtral(112),
        text_config=hf.Qwen3Config(**sizes, head_dim=16),
        image_token_id=image,
        tie_word_embeddings=False,
    )
    pixels = images(3, 112, 112, image_sizes=[112, 112])
    return Structure("LightOnOcrForConditionalGeneration", config, image, 16, pixels)


def qianfan_ocr(**text: Any) -> Structure:
    """Qianfan-OCR: InternVL's tower and shuffle before a Qwen3 decoder."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.QianfanOCRConfig(
        vision_config=tower_sizes(image_size=[112, 112], patch_size=[14, 14]),
        text_config=hf.Qwen3Config(**sizes, head_dim=16),
        image_token_id=image,
        image_seq_length=16,
    )
    return Structure("QianfanOCRForConditionalGeneration", config, image, 16, images(3, 112, 112))


def fast_vlm(**text: Any) -> Structure:
    """FastVLM: a convolutional tower from timm, which must be installed."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.FastVlmConfig(text_config=hf.Qwen2Config(**sizes), image_token_id=image)
    return Structure("FastVlmForConditionalGeneration", config, image, 16, images(3, 256, 256))


def granite4_vision(**text: Any) -> Structure:
    """Granite 4 Vision: features enter before several decoder layers, each from a Q-Former."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.Granite4VisionConfig(
        vision_config={**clip(56).to_dict(), "hidden_size": 64},  # the Q-Former has 64 per head
        text_config={**sizes, "embedding_multiplier": 2.0},
        image_token_index=image,
        image_grid_pinpoints=[[56, 56]],
        image_seq_length=4,
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_target_layers=[0, 1, 2, 3],
    )
    pixels = images(2, 3, 56, 56, image_sizes=[56, 56])
    name = "Granite4VisionForConditionalGeneration"
    return Structure(name, config, image, 10, pixels, makes_cache=False)


def granite_docling(**text: Any) -> Structure:
    """Granite-Docling: tower features added to the first decoder layers (DeepStack)."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = tower_sizes(
        image_size=64,
        patch_size=8,
        out_hidden_size=sizes["hidden_size"],
        scale_factor=2,
        deepstack_visual_indexes=[0, 1, 2],
    )
    config = hf.GraniteDoclingConfig(
        vision_config=tower,
        text_config={**sizes, "logits_scaling": 1.0},
        image_token_id=image,
        tie_word_embeddings=False,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        tiles = torch.randn((count, 3, 64, 64), generator=generator)
        return {"pixel_values": tiles, "pixel_attention_mask": torch.ones(count, dtype=torch.bool)}

    name = "GraniteDoclingForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, per_row=True)


def step3p7(**text: Any) -> Structure:
    """Step 3.7: sliding layers with more heads than full ones, MoE from the second layer on."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    decoder = {
        **sizes,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "sliding_window": 13,
        "num_sliding_attention_heads": 4,
        "layer_types": ["full_attention", "sliding_attention"] * (sizes["num_hidden_layers"] // 2),
        "mlp_layer_types": ["dense"] + ["sparse"] * (sizes["num_hidden_layers"] - 1),
    }
    config = hf.Step3p7Config(
        vision_config=tower_sizes(image_size=224, patch_size=14),
        text_config=decoder,
        image_token_id=image,
    )
    return Structure("Step3p7ForConditionalGeneration", config, image, 16, images(3, 224, 224))


def deepseek_vl_hybrid(**text: Any) -> Structure:
    """DeepSeek-VL 7B: a SigLIP and a SAM tower side by side, at two resolutions."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.DeepseekVLHybridConfig(
        vision_config=siglip(56),
        high_res_vision_config={"model_type": "sam_vision_model", **_sam(24)},
        text_config=hf.LlamaConfig(**sizes),
        image_token_id=image,
        tie_word_embeddings=False,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        return {
            "pixel_values": torch.randn((count, 3, 56, 56), generator=generator),
            "high_res_pixel_values": torch.randn((count, 3, 64, 64), generator=generator),
        }

    return Structure("DeepseekVLHybridForConditionalGeneration", config, image, 16, pixels)


def molmo2(**text: Any) -> Structure:
    """Molmo 2: features of two tower layers, pooled by attention and added to the embeddings."""
    sizes = text_sizes(**text)
    vocab, hidden = sizes["vocab_size"], sizes["hidden_size"]
    image, start, end, low, frame, frame_end = (special(vocab, n) for n in (1, 3, 4, 5, 6, 7))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    config = hf.Molmo2Config(
        vision_config=tower_sizes(
            **heads, image_size=[56, 56], patch_size=14, num_position_embeddings=16
        ),
        adapter_config={
            "vision_feature_layer": [0, 2],
            "hidden_size": 48,
            **heads,
            "intermediate_size": 96,
            "text_hidden_size": hidden,
        },
        text_config={**sizes, "head_dim": 16, "additional_vocab_size": 0},
        image_patch_id=image,
        image_start_token_id=start,
        image_end_token_id=end,
        low_res_image_start_token_id=low,
        frame_start_token_id=frame,
        frame_end_token_id=frame_end,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        crops = torch.randn((count, 16, 588), generator=generator)
        pooled = torch.arange(16 * count).view(-1, 1)
        grids = torch.tensor([[4, 4, 0, 0]] * count)
        return {"pixel_values": crops, "image_token_pooling": pooled, "image_grids": grids}

    name = "Molmo2ForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, types="mm_token_type_ids")
