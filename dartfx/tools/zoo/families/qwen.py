"""The Qwen-VL line and what took over its tower: M-RoPE, image grids, markers around images."""

from __future__ import annotations

from typing import Any

import transformers as hf

from dartfx.tools.zoo.family import Structure, patches, special, text_sizes


def mrope(sizes: dict[str, Any], share: float = 1.0, **more: Any) -> dict[str, Any]:
    """``sizes`` with rotary positions in time, height and width, over ``share`` of each head."""
    head = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    half = int(head * share) // 2
    time, height = half // 4, (half - half // 4) // 2
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [time, height, half - time - height],
        **({"partial_rotary_factor": share} if share != 1.0 else {}),
        **more,
    }
    return {**sizes, "rope_parameters": rope}


def interleaved(sizes: dict[str, Any], share: float = 1.0) -> dict[str, Any]:
    """``sizes`` with heads of 16 channels and M-RoPE whose sections alternate."""
    sizes = mrope({"head_dim": 16, **sizes}, share, mrope_interleaved=True)
    half = int(sizes["head_dim"] * share) // 2
    rest = half // 4
    sizes["rope_parameters"]["mrope_section"] = [half - 2 * rest, rest, rest]
    return sizes


def tokens(vocab_size: int) -> dict[str, int]:
    """The special tokens, under the names of these configurations."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: special(vocab_size, n) for n, name in enumerate(names, 1)}


def structure(
    model_class: str, config: Any, vocab_size: int, *, patch: int = 14, side: int = 4, **more: Any
) -> Structure:
    """A family whose images are grids of flattened patches, between two markers."""
    start, end = special(vocab_size, 3), special(vocab_size, 4)
    grid = 2 * side
    settings = {
        "pixels": patches(grid * grid, 3 * 2 * patch * patch, image_grid_thw=[1, grid, grid]),
        "types": "mm_token_type_ids",
        **more,
    }
    return Structure(
        model_class,
        config,
        special(vocab_size, 1),
        side * side,
        image_prefix=(start,),
        image_suffix=(end,),
        **settings,
    )


def qwen2_vl(**text: Any) -> Structure:
    """Qwen2-VL: positions in time, height and width, cut out of every head."""
    sizes = mrope(text_sizes(**text))
    tower = {
        "depth": 2,
        "embed_dim": 48,
        "hidden_size": sizes["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 2,
    }
    vocab = sizes["vocab_size"]
    config = hf.Qwen2VLConfig(vision_config=tower, text_config=sizes, **tokens(vocab))
    return structure("Qwen2VLForConditionalGeneration", config, vocab)


def window_tower(hidden_size: int) -> dict[str, Any]:
    """A tower of one layer with window attention and a full one."""
    return {
        "depth": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "window_size": 56,
        "fullatt_block_indexes": (1,),
    }


def qwen2_5_vl(*, side: int = 4, **text: Any) -> Structure:
    """Qwen2.5-VL: window attention in the tower; ``side`` squared vision tokens per image."""
    sizes = mrope(text_sizes(**text))
    vocab = sizes["vocab_size"]
    config = hf.Qwen2_5_VLConfig(
        vision_config=window_tower(sizes["hidden_size"]),
        text_config=sizes,
        tie_word_embeddings=False,
        **tokens(vocab),
    )
    return structure("Qwen2_5_VLForConditionalGeneration", config, vocab, side=side)


def deepstack_tower(hidden_size: int) -> dict[str, Any]:
    """A tower whose layers 0, 1 and 2 each hand features to the decoder's first layers."""
    return {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": (0, 1, 2),
        "patch_size": 16,
    }


def plain_tower(hidden_size: int) -> dict[str, Any]:
    """The same tower without DeepStack."""
    tower = deepstack_tower(hidden_size)
    del tower["deepstack_visual_indexes"]
    return tower


def qwen3_vl(**text: Any) -> Structure:
    """Qwen3-VL: DeepStack adds tower features to the hidden states after layers 0, 1 and 2."""
    sizes = interleaved(text_sizes(**{"layers": 5, **text}))
    vocab = sizes["vocab_size"]
    config = hf.Qwen3VLConfig(
        vision_config=deepstack_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Qwen3VLForConditionalGeneration", config, vocab, patch=16)


def _experts() -> dict[str, int]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def qwen3_vl_moe(**text: Any) -> Structure:
    """Qwen3-VL-MoE: DeepStack, and two of four experts for each token."""
    sizes = interleaved(text_sizes(**{"layers": 5, **text}, **_experts()))
    vocab = sizes["vocab_size"]
    config = hf.Qwen3VLMoeConfig(
        vision_config=deepstack_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Qwen3VLMoeForConditionalGeneration", config, vocab, patch=16)


def hybrid_sizes(**text: Any) -> dict[str, Any]:
    """Text sizes with two linear-attention layers before each full one."""
    return text_sizes(
        **{"layers": 6, **text},
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    )


def qwen3_5(**text: Any) -> Structure:
    """Qwen3.5: gated delta rule in two of three layers, a state that runs along the tokens."""
    sizes = interleaved(hybrid_sizes(**text), 0.5)
    vocab = sizes["vocab_size"]
    config = hf.Qwen3_5Config(
        vision_config=plain_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Qwen3_5ForConditionalGeneration", config, vocab, patch=16, layer=3)


def qwen3_5_moe(**text: Any) -> Structure:
    """Qwen3.5-MoE: the same hybrid with experts."""
    more = {**_experts(), "shared_expert_intermediate_size": 48}
    sizes = interleaved(hybrid_sizes(**text, **more), 0.5)
    vocab = sizes["vocab_size"]
    config = hf.Qwen3_5MoeConfig(
        vision_config=plain_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Qwen3_5MoeForConditionalGeneration", config, vocab, patch=16, layer=3)


def _glm_tokens(vocab_size: int) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id")
    more = ("video_start_token_id", "video_end_token_id")
    return {name: special(vocab_size, n) for n, name in enumerate(names + more, 1)}


def glm_tower(hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 48,
        "num_heads": 4,
        "image_size": 112,
        "patch_size": 14,
        "out_hidden_size": hidden_size,
        "intermediate_size": 96,
    }


def glm4v(**text: Any) -> Structure:
    """GLM-4.1V: rotary positions over half of each head, norms before and after each block."""
    sizes = mrope(text_sizes(**text), 0.5)
    vocab = sizes["vocab_size"]
    config = hf.Glm4vConfig(
        vision_config=glm_tower(sizes["hidden_size"]), text_config=sizes, **_glm_tokens(vocab)
    )
    return structure("Glm4vForConditionalGeneration", config, vocab)


def glm46v(**text: Any) -> Structure:
    """GLM-4.6V: GLM-4.1V's parts under another class."""
    sizes = mrope(text_sizes(**text), 0.5)
    vocab = sizes["vocab_size"]
    config = hf.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision", **glm_tower(sizes["hidden_size"])},
        text_config={"model_type": "glm4v_text", **sizes},
        **_glm_tokens(vocab),
    )
    return structure("Glm46VForConditionalGeneration", config, vocab)


def glm4v_moe(**text: Any) -> Structure:
    """GLM-4.5V: a dense layer, then two of four routed experts and a shared one."""
    sizes = mrope(text_sizes(**text), 0.5)
    vocab = sizes["vocab_size"]
    sizes |= {
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    config = hf.Glm4vMoeConfig(
        vision_config=glm_tower(sizes["hidden_size"]), text_config=sizes, **_glm_tokens(vocab)
    )
    return structure("Glm4vMoeForConditionalGeneration", config, vocab)
