"""Families whose images become tokens or queries: image tokenisers and Q-Formers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from dartfx.tools.zoo.family import Inputs, Structure, images, special, text_sizes, tower_sizes


def emu3(**text: Any) -> Structure:
    """Emu3: a VQ-VAE writes each image as ids, which the text embedding looks up."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    image = special(vocab, 1)
    codes = {f"<|visual token {n:06d}|>": 100 + n for n in range(32)}
    tokeniser = {
        "codebook_size": 32,
        "embed_dim": 4,
        "latent_channels": 4,
        "temporal_downsample_factor": 1,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    config = hf.Emu3Config(
        vq_config=tokeniser,
        text_config=sizes,
        vocabulary_map={**codes, "<image>": image, "<|extra_200|>": special(vocab, 2)},
    )
    pixels = images(3, 8, 8, image_sizes=[8, 8])
    return Structure("Emu3ForConditionalGeneration", config, image, 20, pixels)


def chameleon(**text: Any) -> Structure:
    """Chameleon: image ids from a VQ-VAE, norms on queries and keys."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    image = special(vocab, 1)
    digits = "ABCDEFGHIJ"  # a code's name spells its number
    codes = {f"IMGIMG{digits[n // 10]}{digits[n % 10]}Z": 100 + n for n in range(32)}
    tokeniser = {
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 8,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    config = hf.ChameleonConfig(
        **sizes, vq_config=tokeniser, vocabulary_map={**codes, "<image>": image}
    )
    return Structure("ChameleonForConditionalGeneration", config, image, 16, images(3, 16, 16))


def _qformer(vocab: int) -> dict[str, Any]:
    return tower_sizes(2, encoder_hidden_size=48, vocab_size=vocab, cross_attention_frequency=1)


def blip_2(**text: Any) -> Structure:
    """BLIP-2: a Q-Former's queries stand for the image, OPT decoder with learned positions."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    image = special(vocab, 1)
    decoder = hf.OPTConfig(
        **{k: v for k, v in sizes.items() if k != "num_key_value_heads"},
        ffn_dim=160,
        word_embed_proj_dim=sizes["hidden_size"],
    )
    config = hf.Blip2Config(
        vision_config=tower_sizes(2, image_size=56, patch_size=14),
        qformer_config=_qformer(vocab),
        text_config=decoder.to_dict(),
        num_query_tokens=16,
        image_token_index=image,
    )
    name = "Blip2ForConditionalGeneration"
    return Structure(
        name, config, image, 16, images(3, 56, 56), decoder="language_model.model.decoder"
    )


def _questions(name: str, *shape: int) -> Any:
    def pixels(count: int, generator: torch.Generator) -> Inputs:
        return {
            "pixel_values": torch.randn((count, *shape), generator=generator),
            "qformer_input_ids": torch.randint(2, 100, (count, 5), generator=generator),
            "qformer_attention_mask": torch.ones((count, 5), dtype=torch.long),
        }

    return pixels


def instructblip(**text: Any) -> Structure:
    """InstructBLIP: a Q-Former that reads the question too, Llama decoder."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    image = special(vocab, 1)
    config = hf.InstructBlipConfig(
        vision_config=tower_sizes(2, image_size=56, patch_size=14),
        qformer_config=_qformer(vocab),
        text_config={"model_type": "llama", **sizes},
        num_query_tokens=16,
        image_token_index=image,
    )
    name = "InstructBlipForConditionalGeneration"
    return Structure(
        name,
        config,
        image,
        16,
        _questions(name, 3, 56, 56),
        decoder="language_model.model",
    )


def instructblipvideo(**text: Any) -> Structure:
    """InstructBLIP for video: the queries of four frames in a row."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    video = special(vocab, 1)
    config = hf.InstructBlipVideoConfig(
        vision_config=tower_sizes(2, image_size=56, patch_size=14),
        qformer_config=_qformer(vocab),
        text_config={"model_type": "llama", **sizes},
        num_query_tokens=4,
        video_token_index=video,
    )
    name = "InstructBlipVideoForConditionalGeneration"
    return Structure(
        name,
        config,
        video,
        16,
        _questions(name, 4, 3, 56, 56),
        decoder="language_model.model",
    )


def _fairseq(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a text model under the names of these configurations."""
    return {
        "vocab_size": sizes["vocab_size"],
        "embed_dim": sizes["hidden_size"],
        "layers": sizes["num_hidden_layers"],
        "ffn_dim": sizes["intermediate_size"],
        "attention_heads": sizes["num_attention_heads"],
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def kosmos_2(**text: Any) -> Structure:
    """Kosmos-2: sinusoidal positions added to the embeddings, queries that read a CLIP tower."""
    sizes = text_sizes(**text)
    config = hf.Kosmos2Config(
        text_config=_fairseq(sizes),
        vision_config=tower_sizes(2, image_size=56, patch_size=14),
        latent_query_num=16,
        tie_word_embeddings=False,
    )
    return Structure(
        "Kosmos2ForConditionalGeneration",
        config,
        special(sizes["vocab_size"], 1),
        16,
        images(3, 56, 56),
        types="image_embeds_position_mask",
        decoder="text_model.model",
    )


def kosmos_2_5(**text: Any) -> Structure:
    """Kosmos-2.5: the same for documents; patches carry their row and column."""
    sizes = text_sizes(**text)
    tower = tower_sizes(2, head_dim=12, patch_embed_hidden_size=24, max_num_patches=64)
    config = hf.Kosmos2_5Config(
        text_config=_fairseq(sizes),
        vision_config=tower,
        latent_query_num=16,
        tie_word_embeddings=False,
    )

    def pixels(count: int, generator: torch.Generator) -> Inputs:
        rows, columns = (torch.arange(64)[:, None] // 8, torch.arange(64)[:, None] % 8)
        where = torch.cat([rows, columns], 1).float().expand(count, -1, -1)
        drawn = torch.randn((count, 64, 24), generator=generator)
        return {"flattened_patches": torch.cat([where, drawn], 2)}

    return Structure(
        "Kosmos2_5ForConditionalGeneration",
        config,
        special(sizes["vocab_size"], 1),
        16,
        pixels,
        types="image_embeds_position_mask",
        decoder="text_model.model",
    )
