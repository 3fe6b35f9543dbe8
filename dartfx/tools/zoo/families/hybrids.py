"""Families whose decoder mixes tokens by state-space layers as well as by attention."""

from __future__ import annotations

from typing import Any

import transformers as hf

from dartfx.tools.zoo.family import Structure, patches, special, text_sizes, tower_sizes

_RADIO = {
    "model_type": "radio",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2.0,
    "patch_size": 14,
    "max_img_size": 224,
    "video_temporal_patch_size": 2,
}


def nemotron_h_omni(**text: Any) -> Structure:
    """Nemotron 3 Nano Omni: Mamba-2, attention and experts each in separate layers."""
    sizes = text_sizes(**text)
    vocab, layers = sizes["vocab_size"], sizes.pop("num_hidden_layers")
    image, video = special(vocab, 1), special(vocab, 2)
    kinds = ["linear_attention", "full_attention", "linear_attention", "moe", "full_attention"]
    decoder = hf.NemotronHConfig(
        **sizes,
        layers_block_type=(kinds * layers)[:layers],
        head_dim=16,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=_RADIO,
        text_config=decoder,
        vision_hidden_size=48,
        projector_hidden_size=64,
        image_token_id=image,
        video_token_id=video,
        audio_config=None,
    )
    pixels = patches(64, 3 * 14 * 14, image_grid_hw=[8, 8])
    name, decoder_path = "NemotronH_Omni_Reasoning_V3", "language_model.model"
    return Structure(name, config, image, 16, pixels, decoder=decoder_path)


def lfm3_vl(**text: Any) -> Structure:
    """LFM3-VL: short convolutions in tower and decoder, gated attention, sliding and full."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    layers = ["conv", "full_attention", "conv", "sliding_attention"] * sizes["num_hidden_layers"]
    decoder = {
        "model_type": "lfm3",
        **sizes,
        "head_dim": 16,
        "layer_types": layers[: sizes["num_hidden_layers"]],
        "conv_L_cache": 3,
        "sliding_window": 13,
    }
    tower = tower_sizes(4, num_key_value_heads=2, patch_size=14)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: special(vocab, n) for n, name in enumerate(names, 1)}
    config = hf.Lfm3VlConfig(
        vision_config=tower,
        text_config=decoder,
        projector_hidden_size=64,
        tie_word_embeddings=False,
        **tokens,
    )
    pixels = patches(64, 3 * 2 * 14 * 14, image_grid_thw=[1, 8, 8])
    return Structure(
        "Lfm3VlForConditionalGeneration",
        config,
        tokens["image_token_id"],
        16,
        pixels,
        image_prefix=(special(vocab, 3),),
        image_suffix=(special(vocab, 4),),
    )
