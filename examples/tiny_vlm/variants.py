"""The models trained here, as configurations of stock ``LlavaForConditionalGeneration``.

Layers 0 and 1 of every decoder are local: attention within a window of 8 tokens, or a short
convolution. Otherwise, in so small a decoder, the question reads the whole image in these two
layers, and dropping every vision token before layer 2 costs nothing, which would invalidate any
comparison of selectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Lfm2Config,
    LlavaConfig,
    MinistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from world import BOS, COARSE, EOS, FINE, IMAGE, PAD, PATCH, World

VISION_LAYERS, DECODER_LAYERS = 4, 8
WINDOW, WINDOWED = 8, 2  # tokens, layers


@dataclass(frozen=True)
class Variant:
    """A model's images and architecture.

    tower: "clip" or "siglip".  decoder: "qwen2", "ministral" or "lfm2".  folder, questions: next to
    this file, with the trained model and its held-out questions.  pictures: held-out images.
    grids: patches per side of smaller images that it is also trained on.
    tower_of: a trained model whose tower is reused, frozen.
    """

    world: World
    tower: str
    decoder: str
    width: int
    heads: int
    key_heads: int
    inner: int
    folder: str
    questions: str
    pictures: int
    grids: tuple[int, ...] = ()
    tower_of: str = ""

    @property
    def class_tokens(self) -> int:
        """Tokens of the tower before the patch tokens."""
        return int(self.tower == "clip")

    @property
    def convolutions(self) -> int:
        """The number of decoder layers that are short convolutions."""
        return DECODER_LAYERS // 2 if self.decoder == "lfm2" else 0

    def configuration(self) -> LlavaConfig:
        """The configuration of the model."""
        return LlavaConfig(
            vision_config=_tower(self),
            text_config=_decoder(self),
            image_token_index=IMAGE,
            image_seq_length=self.world.tokens,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default" if self.class_tokens else "full",
            tie_word_embeddings=True,
        )


VARIANTS = {
    "coarse": Variant(COARSE, "clip", "qwen2", 128, 4, 4, 384, "model", "heldout", 128),
    "fine": Variant(
        *(FINE, "siglip", "ministral", 192, 6, 3, 512, "model_fine", "heldout_fine", 64),
        grids=(24, 19, 15, 11),
    ),
    "hybrid": Variant(
        *(COARSE, "clip", "lfm2", 128, 4, 4, 384, "model_hybrid", "heldout", 128),
        tower_of="model",
    ),
}


def _tower(variant: Variant) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "hidden_size": variant.width,
        "intermediate_size": variant.inner,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": variant.heads,
        "image_size": variant.world.side,
        "patch_size": PATCH,
    }
    if variant.tower == "clip":
        return CLIPVisionConfig(**sizes, projection_dim=variant.width)
    return SiglipVisionConfig(**sizes, vision_use_head=False)


def _decoder(variant: Variant) -> PreTrainedConfig:
    full = DECODER_LAYERS - WINDOWED
    sizes: dict[str, Any] = {
        "vocab_size": len(variant.world.words),
        "hidden_size": variant.width,
        "intermediate_size": variant.inner,
        "num_hidden_layers": DECODER_LAYERS,
        "num_attention_heads": variant.heads,
        "num_key_value_heads": variant.key_heads,
        "max_position_embeddings": 1024 if variant.world.tokens < 1000 else 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
    }
    window: dict[str, Any] = {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * WINDOWED + ["full_attention"] * full,
    }
    if variant.decoder == "qwen2":
        return Qwen2Config(**sizes, **window, use_sliding_window=True)
    if variant.decoder == "ministral":
        return MinistralConfig(**sizes, **window, head_dim=variant.width // variant.heads)
    layers = ["conv", "full_attention"] * (DECODER_LAYERS // 2)
    return Lfm2Config(**sizes, layer_types=layers, conv_L_cache=3, block_auto_adjust_ff_dim=False)
