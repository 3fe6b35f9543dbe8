"""Families that stand alone: latent attention, chunked attention, encoders, cross attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from dartfx.tools.zoo.families.qwen import hybrid_sizes
from dartfx.tools.zoo.family import Inputs, Structure, images, special, text_sizes, tower_sizes


def minicpmv4_6(**text: Any) -> Structure:
    """MiniCPM-V 4.6: slices of one long strip of patches, hybrid Qwen3.5 decoder."""
    sizes = {**hybrid_sizes(**text), "head_dim": 16}
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    tower = tower_sizes(image_size=128, patch_size=8, insert_layer_id=1)
    config = hf.MiniCPMV4_6Config(
        vision_config=tower,
        text_config=hf.Qwen3_5TextConfig(**sizes),
        image_token_id=image,
        video_token_id=video,
        insert_layer_id=1,
        image_size=128,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        strip = torch.randn((1, 3, 8, 8 * 16 * 16 * count), generator=generator)
        return {"pixel_values": strip, "target_sizes": torch.tensor([[16, 16]] * count)}

    name = "MiniCPMV4_6ForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, layer=3)


def kimi_k25(**text: Any) -> Structure:
    """Kimi K2.5: DeepSeek-V3 decoder, latent attention with keys wider than values, MoE."""
    sizes = text_sizes(**{"num_key_value_heads": 4, **text})
    vocab = sizes["vocab_size"]
    image, video, start, end = (special(vocab, n) for n in range(1, 5))
    tower = tower_sizes(patch_size=14, pos_emb_height=8, pos_emb_width=8)
    config = hf.Kimi_K25Config(
        vision_config=tower,
        text_config=_latent_attention(sizes),
        projection_hidden_size=48,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        cut = torch.randn((count * 64, 3, 14, 14), generator=generator)
        return {"pixel_values": cut, "image_grid_thw": torch.tensor([[1, 8, 8]] * count)}

    name = "Kimi_K25ForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, latent_cache=True)


def _latent_attention(sizes: dict[str, Any]) -> Any:
    return hf.DeepseekV3Config(
        **sizes,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )


def phi4_multimodal(**text: Any) -> Structure:
    """Phi-4 multimodal: merges by positions from ``nonzero``, a branch on the token ids.

    Its tower gives other features under ``torch.compile(backend="eager")`` already, so it is left
    out of what dynamo compiles here.
    """
    sizes = text_sizes(**text)
    image, audio = (special(sizes["vocab_size"], n) for n in (1, 2))
    tower = tower_sizes(image_size=112, patch_size=14, crop_size=112, image_token_id=image)
    ears = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "audio_token_id": audio,
    }
    config = hf.Phi4MultimodalConfig(
        **sizes, original_max_position_embeddings=512, vision_config=tower, audio_config=ears
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        return {
            "image_pixel_values": torch.randn((count, 2, 3, 112, 112), generator=generator),
            "image_sizes": torch.tensor([[112, 112]] * count),
            "image_attention_mask": torch.ones(count, 2, 8, 8),
        }

    tower_path = "model.embed_tokens_extend.image_embed.img_processor"
    name = "Phi4MultimodalForCausalLM"
    return Structure(name, config, image, 41, pixels, eager_parts=(tower_path,))


def llama4(**text: Any) -> Structure:
    """Llama 4: chunked attention, complex rotary table, layers without rotary, MoE every other."""
    sizes = text_sizes(**text)
    vocab, hidden = sizes["vocab_size"], sizes["hidden_size"]
    image, start, end = (special(vocab, n) for n in (1, 3, 4))
    decoder = {
        **sizes,
        "intermediate_size": 80,
        "intermediate_size_mlp": 160,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 13,
        "interleave_moe_layer_step": 2,
    }
    tower = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "vision_output_dim": hidden,
        "image_size": 112,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": hidden,
        "projector_output_dim": hidden,
    }
    config = hf.Llama4Config(
        vision_config=tower,
        text_config=decoder,
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=end,
    )
    pixels = images(3, 112, 112)
    name, decoder_path = "Llama4ForConditionalGeneration", "language_model.model"
    return Structure(name, config, image, 16, pixels, decoder=decoder_path)


def perception_lm(**text: Any) -> Structure:
    """Perception LM: a tower from timm, which must be installed."""
    sizes = text_sizes(**text)
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    tower = {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_large_patch14_336",
        "model_args": {
            "embed_dim": 64,
            "img_size": (56, 56),
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": (4, 4),
        },
    }
    config = hf.PerceptionLMConfig(
        vision_config=tower,
        text_config=hf.LlamaConfig(**sizes),
        image_token_id=image,
        video_token_id=video,
        projector_pooling_ratio=1,
    )
    pixels = images(1, 3, 56, 56)
    return Structure("PerceptionLMForConditionalGeneration", config, image, 16, pixels)


def mllama(**text: Any) -> Structure:
    """Llama 3.2 Vision: no merge at all, the text looks at the image by cross attention."""
    sizes = text_sizes(**text)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    image = special(sizes["vocab_size"], 1)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 64,
        "vision_output_dim": 64,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    decoder = {**sizes, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    config = hf.MllamaConfig(vision_config=tower, text_config=decoder, image_token_index=image)

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        return {
            "pixel_values": torch.randn((count, 1, 3, 28, 28), generator=generator),
            "aspect_ratio_ids": torch.ones(count, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(count, 1, dtype=torch.long),
        }

    def seen(ids: Tensor, mask: Tensor) -> Inputs:
        per_row = int((ids == image).sum()) // ids.shape[0]
        return {"cross_attention_mask": torch.ones(*ids.shape, per_row, 1, dtype=torch.long)}

    name = "MllamaForConditionalGeneration"
    return Structure(name, config, image, 1, pixels, per_row=True, extra=seen)


def florence2(**text: Any) -> Structure:
    """Florence-2: the vision tokens enter the encoder of an encoder-decoder model (BART)."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 4),
        "num_groups": (2, 4),
        "window_size": 4,
        "projection_dim": sizes["hidden_size"],
    }
    config = hf.Florence2Config(text_config=_bart(sizes), vision_config=tower, image_token_id=image)

    def start(ids: Tensor, mask: Tensor) -> Inputs:
        return {"decoder_input_ids": ids[:, :5]}

    name = "Florence2ForConditionalGeneration"
    return Structure(name, config, image, 17, images(3, 32, 32), extra=start)


def _bart(sizes: dict[str, Any]) -> dict[str, Any]:
    width = sizes["hidden_size"]
    return {
        "model_type": "bart",
        "d_model": width,
        "encoder_layers": 3,
        "decoder_layers": sizes["num_hidden_layers"],
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * width,
        "decoder_ffn_dim": 2 * width,
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }


def fuyu(**text: Any) -> Structure:
    """Fuyu: no tower, patches go through one linear layer into a Persimmon decoder."""
    sizes = text_sizes(**{"num_key_value_heads": 4, **text})
    image = special(sizes["vocab_size"], 1)
    config = hf.FuyuConfig(**sizes, image_token_id=image, patch_size=4, text_config=None)
    pixels = images(16, 48, name="image_patches")
    return Structure("FuyuForCausalLM", config, image, 16, pixels)
