"""The workloads of ``bench generate``: published shapes with random weights, or a checkpoint.

llava-1.5-7b    one image of 576 vision tokens, 64 kept
llava-next-7b   one image in five tiles, 2880 vision tokens and 48 of new lines, 320 kept
llava-next-8    the same with 8 of its 32 decoder layers, for what takes long to compile
qwen2.5-vl-7b   one image of 2240 x 1400 pixels, 4000 vision tokens, 888 kept
small           LLaVA-1.5's classes, 12 layers of hidden size 512, 576 vision tokens, 64 kept
tiny            LLaVA-1.5's classes, 4 layers of hidden size 64, 144 vision tokens, 16 kept
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from dartfx.integrations.hf import load_processor, load_weights, prompt_inputs, read_image, to_model
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.zoo.families.llava import llava
from dartfx.tools.zoo.families.qwen import tokens
from dartfx.tools.zoo.family import Family, Structure, images, patches, special, text_sizes

__all__ = ["SHAPES", "build", "load"]

BEFORE, AFTER = 35, 19  # text tokens around the image: 35 is LLaVA-1.5's system prompt
_PROMPT = "Describe this image."


def _clip() -> Any:
    return hf.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def _llama(layers: int = 32) -> dict[str, Any]:
    """Vicuna-7B, with the padded vocabulary of LLaVA's checkpoints."""
    return text_sizes(
        layers=layers,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )


def llava_7b() -> Structure:
    """llava-hf/llava-1.5-7b-hf."""
    sizes = _llama()
    image = special(sizes["vocab_size"], 1)
    config = hf.LlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**sizes), image_token_index=image
    )
    pixels = images(3, 336, 336)
    return Structure("LlavaForConditionalGeneration", config, image, 576, pixels)


def llava_next_7b(layers: int = 32) -> Structure:
    """llava-hf/llava-v1.6-vicuna-7b-hf: 576 tokens of the whole image, 48 rows of 48 + 1."""
    sizes = _llama(layers)
    image = special(sizes["vocab_size"], 1)
    config = hf.LlavaNextConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**sizes), image_token_index=image
    )
    pixels = images(5, 3, 336, 336, image_sizes=[672, 672])
    return Structure("LlavaNextForConditionalGeneration", config, image, 576 + 48 * 49, pixels)


def qwen2_5_vl_7b() -> Structure:
    """Qwen/Qwen2.5-VL-7B-Instruct; a token merges 2 x 2 of 160 x 100 patches."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = text_sizes(
        layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=128000,
        rope_parameters=rope,
    )
    tower = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    }
    vocab = sizes["vocab_size"]
    config = hf.Qwen2_5_VLConfig(vision_config=tower, text_config=sizes, **tokens(vocab))
    return Structure(
        "Qwen2_5_VLForConditionalGeneration",
        config,
        special(vocab, 1),
        4000,
        patches(100 * 160, 3 * 2 * 14 * 14, image_grid_thw=[1, 100, 160]),
        image_prefix=(special(vocab, 3),),
        image_suffix=(special(vocab, 4),),
        types="mm_token_type_ids",
    )


def small() -> Structure:
    """The decoder of ``make bench`` with a small tower, for later turns on a CPU."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return llava(side=24, layers=12, hidden_size=512, max_position_embeddings=4096, **heads)


def tiny() -> Structure:
    """LLaVA-1.5 with two key heads for four query heads, for trying the command."""
    return llava(side=12)


# Builder, and vision tokens kept: the paper's budgets; for Qwen2.5-VL, the default ratio.
SHAPES: dict[str, tuple[Callable[[], Structure], int]] = {
    "llava-1.5-7b": (llava_7b, 64),
    "llava-next-7b": (llava_next_7b, 320),
    "llava-next-8": (partial(llava_next_7b, 8), 320),
    "qwen2.5-vl-7b": (qwen2_5_vl_7b, 888),
    "small": (small, 64),
    "tiny": (tiny, 16),
}


def build(
    name: str, device: torch.device, dtype: torch.dtype, *, images: int = 1, batch: int = 1
) -> Workload:
    """Build a model of this shape, with every weight created on ``device`` in ``dtype``.

    images: consecutive images in each prompt; batch: prompts, all with the same tokens and pixels.
    """
    structure = SHAPES[name][0]()
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(structure.config, dtype=dtype)
    model.eval().requires_grad_(False)
    inputs = Family(name, structure, model).make_inputs("one", before=BEFORE, after=AFTER)
    return _place(name, model, _repeated(inputs, images, batch))


def _repeated(inputs: dict[str, Any], images: int, batch: int) -> dict[str, Any]:
    """Inputs of ``batch`` equal prompts, each with its image repeated ``images`` times."""
    length = inputs["input_ids"].shape[1]

    def repeat(value: torch.Tensor) -> torch.Tensor:
        if value.shape != (1, length):  # of the images
            return torch.cat([value] * (images * batch))
        row = [value[:, :BEFORE], *[value[:, BEFORE:-AFTER]] * images, value[:, -AFTER:]]
        return torch.cat([torch.cat(row, 1)] * batch)

    return {name: repeat(value) for name, value in inputs.items()}


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    image: Path | None,
    prompt: str | None,
) -> Workload:
    """Load a checkpoint by folder or hub name, and its inputs; the default image is noise.

    Raises InputError for anything unusable.
    """
    from PIL import Image

    picture = read_image(image) if image else Image.effect_noise((672, 672), 80.0).convert("RGB")
    inputs = prompt_inputs(load_processor(name), picture, prompt or _PROMPT)
    return _place(name, load_weights(name, device, dtype), inputs)


def _place(name: str, model: Any, inputs: dict[str, Any]) -> Workload:
    """Build the workload, with inputs moved to the model's device and floats to its dtype."""
    # Without an end token, every answer has exactly the requested length.
    model.generation_config.eos_token_id = None
    cast = to_model(inputs, model)
    vision = cast["input_ids"] == model.config.image_token_id
    return Workload(name, model, cast, vision)
