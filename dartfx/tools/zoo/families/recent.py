"""Families of transformers 5.23: grids of patches, M-RoPE, relative positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from dartfx.tools.zoo.families.qwen import deepstack_tower, interleaved, mrope, structure, tokens
from dartfx.tools.zoo.family import (
    Inputs,
    Structure,
    images,
    patches,
    special,
    text_sizes,
    tower_sizes,
)


def cosmos3_edge(**text: Any) -> Structure:
    """Cosmos3 Edge: SigLIP-like tower, M-RoPE, MLPs with squared ReLU."""
    sizes = mrope({**text_sizes(**text), "head_dim": 16})
    vocab = sizes["vocab_size"]
    config = hf.Cosmos3EdgeConfig(
        vision_config=tower_sizes(patch_size=16, num_patches=64),
        text_config=sizes,
        projector_hidden_size=96,
        **tokens(vocab),
    )
    name = "Cosmos3EdgeForConditionalGeneration"
    pixels = patches(64, 3 * 16 * 16, image_grid_thw=[1, 8, 8])
    return structure(name, config, vocab, pixels=pixels)


def cosmos3_omni(**text: Any) -> Structure:
    """Cosmos3 Omni's reasoner: Qwen3-VL under another class, DeepStack."""
    sizes = interleaved(text_sizes(**{"layers": 5, **text}))
    vocab = sizes["vocab_size"]
    config = hf.Cosmos3OmniConfig(
        vision_config=deepstack_tower(sizes["hidden_size"]), text_config=sizes, **tokens(vocab)
    )
    return structure("Cosmos3OmniForConditionalGeneration", config, vocab, patch=16)


def _muse_tower() -> dict[str, Any]:
    return tower_sizes(
        4, patch_size=14, pos_emb_height=4, pos_emb_width=4, max_position_embeddings=16
    )


def _muse(kind: str, text: dict[str, Any], decoder: dict[str, Any], **more: Any) -> Structure:
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    config = getattr(hf, f"{kind}Config")(
        vision_config=_muse_tower(),
        text_config={**sizes, "head_dim": 16, "sliding_window": 13, **decoder},
        image_token_id=special(vocab, 1),
        video_token_id=special(vocab, 2),
        out_hidden_size=192,
        projector_hidden_size=64,
        **more,
    )
    return structure(f"{kind}ForConditionalGeneration", config, vocab, types="")


def muse_glimmer(**text: Any) -> Structure:
    """Muse Glimmer: gated attention, head norms without weights, full layers without rotary."""
    return _muse("MuseGlimmer", text, {})


def muse_spark(**text: Any) -> Structure:
    """Muse Spark: experts of another width, gated residuals, sliding and full layers."""
    experts = {
        "moe_intermediate_size": 32,
        "moe_hidden_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    ears = {
        "patch_sizes": [4, 4],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": text_sizes(**text)["hidden_size"],
    }
    return _muse("MuseSpark", text, experts, audio_config=ears)


def _relative(vocab: int, layers: int) -> dict[str, Any]:
    """Relative positions, short convolutions and experts; every other layer a window."""
    return {
        "unpadded_vocab_size": vocab,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 13,
        "d_rel": 4,
        "rel_extent": 64,
        "layer_types": (["hybrid_sliding", "hybrid"] * layers)[:layers],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }


def inkling(**text: Any) -> Structure:
    """Inkling: relative position biases in place of rotary, short convolutions in every layer."""
    sizes = text_sizes(**text)
    vocab, layers = sizes["vocab_size"], sizes["num_hidden_layers"]
    del sizes["tie_word_embeddings"]
    relative = {
        **_relative(vocab, layers),
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 1.0,
    }
    config = hf.InklingConfig(
        text_config={**sizes, **relative, "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)},
        vision_config=tower_sizes(3, patch_size=8),
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 16},
        image_token_id=special(vocab, 1),
        audio_token_id=special(vocab, 5),
        image_bos_token_id=special(vocab, 3),
        audio_bos_token_id=special(vocab, 6),
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn((count * 16, 2, 8, 8, 3), generator=generator)}

    return Structure(
        "InklingForConditionalGeneration",
        config,
        special(vocab, 1),
        16,
        pixels,
        image_prefix=(special(vocab, 3),),
        makes_cache=False,
    )


def inkling2(**text: Any) -> Structure:
    """Inkling 2: residuals that attend to blocks of layers, relative positions, convolutions."""
    sizes = text_sizes(**text)
    vocab, layers = sizes["vocab_size"], sizes["num_hidden_layers"]
    for name in ("tie_word_embeddings", "intermediate_size"):
        del sizes[name]
    config = hf.Inkling2Config(
        text_config={**sizes, **_relative(vocab, layers), "n_layers_per_attn_res_block": 2},
        vision_config=tower_sizes(
            patch_size=14,
            posemb_grid_size=4,
            projection_hidden_dim=96,
            text_hidden_size=sizes["hidden_size"],
        ),
        image_token_id=special(vocab, 1),
    )
    pixels = images(16, 28, 28, 3)
    base = images(1, image_grid_thw=[1, 4, 4], name="unused")

    def flattened(count: int, generator: torch.Generator) -> Inputs:
        values = pixels(count, generator)["pixel_values"].flatten(0, 1)
        return {"pixel_values": values, "image_grid_thw": base(count, generator)["image_grid_thw"]}

    name = "Inkling2ForConditionalGeneration"
    return Structure(name, config, special(vocab, 1), 16, flattened, attention="eager")
