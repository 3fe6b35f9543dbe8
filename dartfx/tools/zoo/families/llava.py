"""The LLaVA line: a projector puts vision features where placeholder tokens stand."""

from __future__ import annotations

from typing import Any

import transformers as hf

from dartfx.tools.zoo.family import Structure, images, special, text_sizes, tower_sizes

_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def clip(image_size: int) -> Any:
    """A CLIP tower of two layers, patches of 14 pixels."""
    return hf.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )


def siglip(image_size: int) -> Any:
    """A SigLIP tower of two layers, patches of 14 pixels, no class token."""
    return hf.SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )


def llava(*, side: int = 4, **text: Any) -> Structure:
    """LLaVA-1.5 with a Llama decoder; ``side`` squared vision tokens for each image."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.LlavaConfig(
        vision_config=clip(14 * side),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=image,
        image_seq_length=side * side,
        vision_feature_layer=-2,
    )
    pixels = images(3, 14 * side, 14 * side)
    return Structure("LlavaForConditionalGeneration", config, image, side * side, pixels)


def llava_pixtral(**text: Any) -> Structure:
    """Pixtral: LLaVA's classes around a Pixtral tower, images of their own sizes."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.LlavaConfig(
        vision_config=pixtral(56),
        text_config=hf.MistralConfig(**sizes, sliding_window=None, head_dim=16),
        image_token_index=image,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixels = images(3, 56, 56, image_sizes=[56, 56])
    return Structure("LlavaForConditionalGeneration", config, image, 16, pixels)


def pixtral(image_size: int) -> Any:
    """A Pixtral tower of three layers: rotary positions in two dimensions."""
    return hf.PixtralVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )


def mistral3(**text: Any) -> Structure:
    """Mistral Small 3.1: Pixtral tower, patches merged 2 x 2."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.Mistral3Config(
        vision_config=pixtral(112),
        text_config=hf.MistralConfig(**sizes, sliding_window=None, head_dim=16),
        image_token_index=image,
    )
    pixels = images(3, 112, 112, image_sizes=[112, 112])
    return Structure("Mistral3ForConditionalGeneration", config, image, 16, pixels)


def vipllava(**text: Any) -> Structure:
    """VipLLaVA: features of several tower layers side by side."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.VipLlavaConfig(
        vision_config=clip(56),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=image,
        vision_feature_layers=(0, 1, 2),
        image_seq_length=16,
    )
    return Structure("VipLlavaForConditionalGeneration", config, image, 16, images(3, 56, 56))


def llava_next(**text: Any) -> Structure:
    """LLaVA-NeXT: a base tile and an AnyRes grid of 2 x 2 tiles, 24 vision tokens per image.

    The 24 are 4 of the base tile, 16 of the grid, and one newline token for each grid row.
    """
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    config = hf.LlavaNextConfig(
        vision_config=clip(28),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=image,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=4,
    )
    pixels = images(5, 3, 28, 28, image_sizes=[56, 56])
    return Structure("LlavaNextForConditionalGeneration", config, image, 24, pixels)


def llava_next_video(**text: Any) -> Structure:
    """LLaVA-NeXT-Video: here a video of eight frames, pooled to one token each."""
    sizes = text_sizes(**text)
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(28),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=4,
        video_seq_length=4,
    )
    pixels = images(16, 3, 28, 28, name="pixel_values_videos")
    return Structure("LlavaNextVideoForConditionalGeneration", config, video, 16, pixels)


def llava_onevision(**text: Any) -> Structure:
    """LLaVA-OneVision: SigLIP tower, Qwen2 decoder with biases, AnyRes grid with newline tokens."""
    sizes = text_sizes(**text)
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(28),
        text_config=hf.Qwen2Config(**sizes),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=_PINPOINTS,
    )
    pixels = images(5, 3, 28, 28, image_sizes=[56, 56])
    return Structure("LlavaOnevisionForConditionalGeneration", config, image, 24, pixels)


def video_llava(**text: Any) -> Structure:
    """Video-LLaVA: one tower for images and one for videos; here an image."""
    sizes = text_sizes(**text)
    image, video = (special(sizes["vocab_size"], n) for n in (1, 2))
    config = hf.VideoLlavaConfig(
        vision_config=clip(56),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=image,
        video_token_index=video,
    )
    pixels = images(3, 56, 56, name="pixel_values_images")
    return Structure("VideoLlavaForConditionalGeneration", config, image, 16, pixels)


def internvl(**text: Any) -> Structure:
    """InternVL3: its own tower, pixels shuffled 2 x 2, Qwen2 decoder."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = tower_sizes(image_size=[112, 112], patch_size=[14, 14])
    config = hf.InternVLConfig(
        vision_config=tower, text_config=hf.Qwen2Config(**sizes), image_token_id=image
    )
    return Structure("InternVLForConditionalGeneration", config, image, 16, images(3, 112, 112))


def _idefics3(kind: str, text: dict[str, Any]) -> Structure:
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = tower_sizes(image_size=64, patch_size=8)
    config = getattr(hf, f"{kind}Config")(
        vision_config=tower,
        text_config=hf.LlamaConfig(**sizes),
        image_token_id=image,
        scale_factor=2,
    )
    name = f"{kind}ForConditionalGeneration"
    return Structure(name, config, image, 16, images(3, 64, 64), per_row=True)


def idefics3(**text: Any) -> Structure:
    """Idefics3: images lie in a row's own dimension, and empty ones are filtered out."""
    return _idefics3("Idefics3", text)


def smolvlm(**text: Any) -> Structure:
    """SmolVLM: Idefics3 with another way of writing the merge."""
    return _idefics3("SmolVLM", text)


def aya_vision(**text: Any) -> Structure:
    """Aya Vision: Cohere2 decoder, attention and MLP side by side; full layers without rotary."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    decoder = hf.Cohere2Config(**sizes, sliding_window=13, layer_types=layers)
    config = hf.AyaVisionConfig(
        vision_config=siglip(112), text_config=decoder, image_token_index=image
    )
    return Structure("AyaVisionForConditionalGeneration", config, image, 16, images(3, 112, 112))


def ovis2(**text: Any) -> Structure:
    """Ovis2: features are mixtures of a visual vocabulary; five indicator tokens around them."""
    sizes = text_sizes(**text)
    vocab = sizes["vocab_size"]
    image, *indicators = (special(vocab, n) for n in range(1, 7))
    tower = tower_sizes(
        image_size=112, patch_size=14, vocab_size=96, hidden_stride=2, num_visual_indicator_tokens=5
    )
    config = hf.Ovis2Config(
        vision_config=tower,
        text_config=hf.Qwen2Config(**sizes),
        image_token_id=image,
        visual_indicator_token_ids=tuple(indicators),
        vocab_size=vocab,
        hidden_size=sizes["hidden_size"],
    )
    return Structure(
        "Ovis2ForConditionalGeneration",
        config,
        image,
        16,
        images(3, 112, 112),
        image_prefix=(indicators[0],),
        image_suffix=(indicators[1],),
    )


def lfm2_vl(**text: Any) -> Structure:
    """LFM2-VL: a hybrid decoder whose short convolutions mix neighbouring tokens."""
    sizes = text_sizes(**text)
    image = special(sizes["vocab_size"], 1)
    tower = tower_sizes(
        model_type="siglip2_vision_model", patch_size=8, num_patches=64, vision_use_head=False
    )
    layers = ["conv", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    decoder = {"model_type": "lfm2", **sizes, "layer_types": layers, "conv_L_cache": 3}
    config = hf.Lfm2VlConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_id=image,
        downsample_factor=2,
        projector_hidden_size=64,
    )
    pixels = images(64, 192, spatial_shapes=[8, 8], pixel_attention_mask=[1] * 64)
    return Structure("Lfm2VlForConditionalGeneration", config, image, 16, pixels)
