"""Families in which an indexer of each layer picks the keys that a query sees."""

from __future__ import annotations

from typing import Any

import transformers as hf

from dartfx.tools.zoo.families.llava import pixtral
from dartfx.tools.zoo.families.qwen import glm_tower, interleaved, plain_tower, structure, tokens
from dartfx.tools.zoo.family import Structure, images, patches, special, text_sizes, tower_sizes


def _latent() -> dict[str, Any]:
    """Latent attention with an indexer, and experts from the second layer on."""
    return {
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 16,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
    }


def mistral_large4(**text: Any) -> Structure:
    """Mistral Large 4: an indexer picks keys, latent attention, layers without rotary."""
    sizes = text_sizes(**{"num_key_value_heads": 4, **text})
    image, layers = special(sizes["vocab_size"], 1), sizes["num_hidden_layers"]
    latent = _latent()
    del latent["q_lora_rank"]
    config = hf.MistralLarge4Config(
        vision_config=pixtral(112),
        text_config={
            **sizes,
            **latent,
            "indexer_types": ["full", "full", "shared", "full"][:layers],
        },
        image_token_index=image,
    )
    pixels = images(3, 112, 112, image_sizes=[112, 112])
    name = "MistralLarge4ForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, latent_cache=True)


def _dots_towers(hidden: int) -> dict[str, Any]:
    """A tower of two layers with experts, and one of sound."""
    tower = tower_sizes(
        patch_size=14,
        moe_intermediate_size=32,
        adapter_in_dim=48,
        adapter_out_dim=hidden,
        pyramid_num_routed=[-1, 4, 4],
    )
    ears = tower_sizes(
        1,
        feature_size=16,
        downsample_hidden_size=16,
        adapter_input_size=48,
        adapter_out_dim=hidden,
    )
    return {"vision_config": tower, "audio_config": ears}


def dots3_note(**text: Any) -> Structure:
    """dots3-note: an indexer or a window picks keys, experts in tower and decoder."""
    sizes = text_sizes(**{"num_key_value_heads": 4, **text})
    vocab, hidden = sizes["vocab_size"], sizes["hidden_size"]
    image, video, audio = (special(vocab, n) for n in (1, 2, 5))
    kinds = ["indexed_attention", "indexed_attention", "sliding_attention", "indexed_attention"]
    window = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 24,
        "head_dim": 24,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    decoder = {
        **sizes,
        **_latent(),
        "shared_experts_intermediate_size": 32,
        "layer_types": kinds[: sizes["num_hidden_layers"]],
        "sliding_window": 13,
        **{f"swa_{name}": value for name, value in window.items()},
    }
    config = hf.Dots3NoteConfig(
        text_config=decoder,
        **_dots_towers(hidden),
        image_token_id=image,
        video_token_id=video,
        audio_token_id=audio,
    )
    pixels = patches(64, 3 * 14 * 14, image_grid_thw=[1, 8, 8])
    name = "Dots3NoteForConditionalGeneration"
    return Structure(name, config, image, 16, pixels, latent_cache=True)


def qwen4_exp(**text: Any) -> Structure:
    """Qwen4-Exp: gated delta rule and indexed attention, several residual streams."""
    sizes = text_sizes(
        **{"layers": 6, **text},
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "linear_attention", "indexed_attention"] * 2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
    )
    sizes = interleaved(sizes, 0.5)
    vocab = sizes["vocab_size"]
    config = hf.Qwen4ExpConfig(
        vision_config=plain_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Qwen4ExpForConditionalGeneration", config, vocab, patch=16, layer=3)


def glm5_next(**text: Any) -> Structure:
    """GLM-5.3 Flash: Kimi delta attention, indexed attention, residual streams."""
    sizes = text_sizes(**{"num_key_value_heads": 4, **text})
    vocab, layers = sizes["vocab_size"], sizes["num_hidden_layers"]
    kinds = ["linear_attention", "indexed_attention"] * layers
    decoder = {
        **sizes,
        **_latent(),
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 16,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "layer_types": kinds[:layers],
        "indexer_types": ["full"] * layers,
        "index_kpool": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
    }
    tower = {**glm_tower(sizes["hidden_size"]), "projection_intermediate_size": 96}
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    ids = {name: special(vocab, n) for n, name in enumerate(names, 1)}
    config = hf.Glm5NextConfig(vision_config=tower, text_config=decoder, **ids)
    name = "Glm5NextForConditionalGeneration"
    return structure(name, config, vocab, layer=2, latent_cache=True)


def minimax_m3_vl(**text: Any) -> Structure:
    """MiniMax-M3: an indexer picks the blocks of keys that each query sees; experts."""
    sizes = text_sizes(**text)
    vocab, layers = sizes["vocab_size"], sizes["num_hidden_layers"]
    kinds = ["full_attention", "minimax_m3_sparse"] * layers
    decoder = {
        **sizes,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "intermediate_size": 48,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 48,
        "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
        "layer_types": kinds[:layers],
        "index_n_heads": sizes["num_key_value_heads"],
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    }
    config = hf.MiniMaxM3VLConfig(
        vision_config=tower_sizes(image_size=112, patch_size=14),
        text_config=decoder,
        image_token_index=special(vocab, 1),
        video_token_index=special(vocab, 2),
        projector_hidden_size=64,
    )
    return structure("MiniMaxM3SparseForConditionalGeneration", config, vocab, types="")
