"""Tiny random vision-language models of three families, and inputs that fit them.

The models are the untouched Hugging Face classes with small configurations: fp32, eval, seeded.
Weights are drawn with the standard deviation 1 / sqrt(hidden_size) rather than the usual 0.02,
so that dropping or misplacing one token moves the logits by far more than rounding does.
Sizes are free, so a test can make the sequence length equal the hidden size, the vocabulary, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

Inputs = dict[str, Tensor]
Segment = list[int]
VARIANTS = ("one", "two", "pad2", "pad4", "ragged", "text")
_GAP = 3  # text tokens between two images
_PAD_ID, _BOS_ID, _FIRST_TEXT_ID = 0, 1, 2
# Special ids are counted from the end of the vocabulary, so that any vocabulary size works.
_SPECIAL = {"image": 1, "video": 2, "start": 3, "end": 4}


@dataclass(frozen=True)
class Family:
    """A model and what is needed to write prompts for it."""

    name: str
    model: Any
    image_token_id: int
    tokens_per_image: int
    pixels: Callable[[int, torch.Generator], Inputs]
    image_prefix: tuple[int, ...] = ()
    image_suffix: tuple[int, ...] = ()
    has_token_types: bool = False

    @property
    def text_ids(self) -> range:
        """Token ids that are plain text in this model's vocabulary."""
        vocab = self.model.config.get_text_config().vocab_size
        return range(_FIRST_TEXT_ID, vocab - len(_SPECIAL))

    def make_inputs(
        self,
        variant: str = "one",
        *,
        before: int = 5,
        after: int = 8,
        length: int | None = None,
        seed: int = 1,
    ) -> Inputs:
        """Keyword arguments of ``model(...)`` and ``model.generate(...)``; see ``VARIANTS``.

        ``before`` and ``after`` count the text tokens around the image of the longest row;
        ``length`` sets the length of that row instead of ``after``.
        ``pad2`` and ``pad4`` are left-padded batches, one image in each row, shorter row by row.
        ``ragged`` has two images in row 0 and one in row 1.
        ``text`` holds no image and has exactly the shapes of ``one``.
        Raises ValueError on an unknown variant or a length the images do not fit in.
        """
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; choose one of {VARIANTS}")
        generator = torch.Generator().manual_seed(seed)
        if length is not None:
            after += length - len(self._rows(variant, before, after, generator)[0])
            if after < 1:
                raise ValueError(f"length={length} leaves no text after the images of {variant!r}")
            generator.manual_seed(seed)
        return self._pack(self._rows(variant, before, after, generator), generator)

    def row(self, inputs: Inputs, index: int) -> Inputs:
        """Row ``index`` of a batch as a prompt of its own, without its padding."""
        image = inputs["input_ids"] == self.image_token_id
        counts = (image.sum(1) // self.tokens_per_image).tolist()
        first, last = sum(counts[:index]), sum(counts[: index + 1])
        valid = inputs["attention_mask"][index].bool()
        alone: Inputs = {}
        for name, value in inputs.items():
            if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                alone[name] = value[index, valid][None]
            elif last > first:
                per_image = value.shape[0] // sum(counts)
                alone[name] = value[first * per_image : last * per_image]
        return alone

    def _rows(
        self, variant: str, before: int, after: int, generator: torch.Generator
    ) -> list[Segment]:
        def text(n: int) -> Segment:
            low, high = self.text_ids.start, self.text_ids.stop
            return torch.randint(low, high, (max(1, n),), generator=generator).tolist()

        image = [*self.image_prefix]
        image += [self.image_token_id] * self.tokens_per_image + [*self.image_suffix]
        if variant == "text":
            return [text(max(1, before) + len(image) + max(1, after))]
        two = text(before) + image + text(_GAP) + image + text(after)
        if variant == "two":
            return [two]
        if variant == "ragged":
            return [two, text(before) + image + text(after)]
        count = {"one": 1, "pad2": 2, "pad4": 4}[variant]
        return [text(before - i) + image + text(after - i) for i in range(count)]

    def _pack(self, rows: list[Segment], generator: torch.Generator) -> Inputs:
        width = max(map(len, rows))
        ids = torch.tensor([[_PAD_ID] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        image = ids == self.image_token_id
        if self.has_token_types:
            inputs["mm_token_type_ids"] = image.int()
        if images := int(image.sum()) // self.tokens_per_image:
            inputs |= self.pixels(images, generator)
        return {name: value.to(self.model.device) for name, value in inputs.items()}


def _special(vocab_size: int) -> dict[str, int]:
    return {name: vocab_size - back for name, back in _SPECIAL.items()}


def _text_sizes(
    layers: int = 4,
    hidden_size: int = 64,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 200,
    **more: Any,
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 5 // 2,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "initializer_range": hidden_size**-0.5,
        "tie_word_embeddings": False,
        "bos_token_id": _BOS_ID,
        "eos_token_id": None,
        "pad_token_id": _PAD_ID,
        **more,
    }


def _clip(image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
        initializer_factor=2.0,
    )


def _shake(decoder: Any) -> None:
    """Give norms and biases real values: all ones and zeros would hide that one was left out."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter += 0.4 * torch.randn_like(parameter)


def _build(model_class: Any, config: Any, seed: int, attn_implementation: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        _shake(model.get_decoder())
    model.set_attn_implementation(attn_implementation)
    vocab = config.get_text_config().vocab_size
    with torch.no_grad():
        # Their logits are then zero, so greedy decoding never writes a placeholder token.
        model.lm_head.weight[vocab - len(_SPECIAL) :] = 0.0
    return model.requires_grad_(False)


def build_llava(
    *, seed: int = 0, attn_implementation: str = "sdpa", side: int = 4, **text: Any
) -> Family:
    """LLaVA-1.5 with a Llama decoder; ``side`` squared vision tokens for each image."""
    sizes = _text_sizes(**text)
    image_id = _special(sizes["vocab_size"])["image"]
    config = LlavaConfig(
        vision_config=_clip(14 * side),
        text_config=LlamaConfig(**sizes),
        image_token_index=image_id,
        image_seq_length=side * side,
        vision_feature_layer=-2,
    )
    model = _build(LlavaForConditionalGeneration, config, seed, attn_implementation)

    def pixels(images: int, generator: torch.Generator) -> Inputs:
        shape = (images, 3, 14 * side, 14 * side)
        return {"pixel_values": torch.randn(shape, generator=generator)}

    return Family("llava", model, image_id, side * side, pixels)


def build_llava_next(*, seed: int = 0, attn_implementation: str = "sdpa", **text: Any) -> Family:
    """LLaVA-NeXT: a base tile and an AnyRes grid of 2 x 2 tiles, 24 vision tokens per image.

    The 24 are 4 of the base tile, 16 of the grid, and one newline token for each grid row.
    """
    sizes = _text_sizes(**text)
    image_id = _special(sizes["vocab_size"])["image"]
    config = LlavaNextConfig(
        vision_config=_clip(28),
        text_config=LlamaConfig(**sizes),
        image_token_index=image_id,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_seq_length=4,
    )
    model = _build(LlavaNextForConditionalGeneration, config, seed, attn_implementation)

    def pixels(images: int, generator: torch.Generator) -> Inputs:
        tiles = torch.randn((images, 5, 3, 28, 28), generator=generator)
        return {"pixel_values": tiles, "image_sizes": torch.tensor([[56, 56]] * images)}

    return Family("llava_next", model, image_id, 24, pixels)


def build_qwen2_5_vl(
    *, seed: int = 0, attn_implementation: str = "sdpa", side: int = 4, **text: Any
) -> Family:
    """Qwen2.5-VL with M-RoPE; ``side`` squared vision tokens per image, between two markers."""
    sizes = _text_sizes(**text)
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    time, height = half // 4, (half - half // 4) // 2
    sizes["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [time, height, half - time - height],
    }
    special = _special(sizes["vocab_size"])
    vision = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": sizes["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": (1,),
        "initializer_range": 0.1,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=sizes,
        image_token_id=special["image"],
        video_token_id=special["video"],
        vision_start_token_id=special["start"],
        vision_end_token_id=special["end"],
        initializer_range=sizes["initializer_range"],
        tie_word_embeddings=False,
    )
    model = _build(Qwen2_5_VLForConditionalGeneration, config, seed, attn_implementation)
    grid = 2 * side  # patches on each edge; a token merges 2 x 2 of them

    def pixels(images: int, generator: torch.Generator) -> Inputs:
        patches = torch.randn((images * grid * grid, 3 * 2 * 14 * 14), generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, grid, grid]] * images)}

    return Family(
        "qwen2_5_vl",
        model,
        special["image"],
        side * side,
        pixels,
        image_prefix=(special["start"],),
        image_suffix=(special["end"],),
        has_token_types=True,
    )


BUILDERS: dict[str, Callable[..., Family]] = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "qwen2_5_vl": build_qwen2_5_vl,
}
