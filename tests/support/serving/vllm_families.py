"""Tiny random models of other families with their processors, saved in vLLM's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dartfx.tools.zoo.registry import load

WORDS = "what is this red blue a digit ? where one two row of the in on"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer(special: dict[str, int], size: int, **named: str) -> Any:
    """A tokenizer of words: those of WORDS, ``special`` at their ids, fillers.

    named: special tokens that a processor looks for by an attribute.
    """
    at = {number: word for word, number in special.items()}
    plain = iter(WORDS.split())
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for number in range(3, size):
        words[at.get(number) or next(plain, f"w{number}")] = number
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=built,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        **({"extra_special_tokens": named} if named else {}),
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def qwen2_5_vl() -> tuple[Any, Any, str]:
    """M-RoPE, and as many vision tokens as a picture is large."""
    model = load("qwen2_5_vl", hidden_size=128).model
    config = model.config
    special = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=224 * 224),
        tokenizer(special, config.text_config.vocab_size),
        hf.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    return model, processor, "<|vision_start|> <|image_pad|> <|vision_end|>"


def llava_next() -> tuple[Any, Any, str]:
    """A base tile and a grid of tiles, with tokens at the ends of rows."""
    model = load("llava_next", hidden_size=128).model
    config = model.config
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer({"<image>": config.image_token_id}, config.text_config.vocab_size),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor, "<image>"


def internvl() -> tuple[Any, Any, str]:
    """Tiles and a thumbnail; start and end tokens around each picture."""
    model = load("internvl", hidden_size=128).model
    config = model.config
    names = {
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "start_image_token": "<img>",
        "video_token": "<video>",
    }
    ids = range(config.image_token_id, 0, -1)
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(
            size={"height": 112, "width": 112}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer(
            dict(zip(names.values(), ids, strict=False)), config.text_config.vocab_size, **names
        ),
        hf.InternVLVideoProcessor(size={"height": 112, "width": 112}),
        image_seq_length=16,
        chat_template=TEMPLATE,
    )
    return model, processor, "<IMG_CONTEXT>"


FAMILIES = {"internvl": internvl, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl}


def save(name: str, folder: Path) -> tuple[Any, Any, str]:
    """The model, its processor and the text of a picture, saved in ``folder``."""
    model, processor, picture = FAMILIES[name]()
    with torch.no_grad():  # louder layers: otherwise a picture hardly changes an answer
        for weight in model.get_decoder().parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    if model.config.vision_config.model_type.startswith("clip"):
        # vLLM looks for a CLIP tower where earlier transformers saved it.
        file, old = folder / "model.safetensors", "vision_tower."
        weights = load_file(file)
        renamed = {name: name.replace(old, f"{old}vision_model.") for name in weights}
        save_file({renamed[k]: w for k, w in weights.items()}, file, metadata={"format": "pt"})
    processor.save_pretrained(folder)
    return model, processor, picture
