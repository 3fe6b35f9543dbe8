"""Prune the audio tokens of an audio-language model: nothing in dartfx is specific to images.

Whatever a model merges into its text embeddings is a sequence of media tokens, selected by the same
rule.  ``pivot_media_tokens`` and ``dartfx.media_tokens`` are neutral aliases of
``pivot_image_tokens`` and ``dartfx.vision_tokens``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

import dartfx

AUDIO, TOKENS, RETAIN, LAYER = 999, 64, 16, 2


def model_and_inputs() -> tuple[Any, dict[str, Tensor]]:
    """A small Qwen2-Audio with random weights, and a prompt with one clip of 64 audio tokens."""
    torch.manual_seed(0)
    audio = {
        "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "num_mel_bins": 32, "max_source_positions": 2 * TOKENS,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    frames = 4 * TOKENS  # the encoder and the pooling after it each halve their number
    ids = torch.randint(1, AUDIO, (1, 4 + TOKENS + 9))
    ids[:, 4 : 4 + TOKENS] = AUDIO
    return model, {
        "input_ids": ids,
        "input_features": torch.randn(1, 32, frames),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }


def main(**options: object) -> tuple[Tensor, dartfx.Report]:
    """Generate with pruned audio tokens; returns the tokens [1, S + 8] and the report."""
    model, inputs = model_and_inputs()
    dartfx.compile(model, retain_tokens=RETAIN, layer=LAYER, pivot_media_tokens=4, **options)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    report = next(r for r in dartfx.reports() if r.pruned)
    print(report)
    return tokens, report


if __name__ == "__main__":
    main()
