"""What the examples share: models to run, and how a prefill is called and timed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dartfx.tools.bench.timing import alternate, cache_bytes, seconds, twin

__all__ = [
    "IMAGE_ID",
    "SIZES",
    "Inputs",
    "Size",
    "alternate",
    "build_model",
    "build_processor",
    "cache_bytes",
    "cache_lengths",
    "decode_eagerly",
    "first_call",
    "prefill",
    "random_inputs",
    "seconds",
    "twin",
    "warm_up",
]

Inputs = dict[str, Any]

PATCH = 14
VOCABULARY = 512
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")  # the ids are 0, 1, 2, 3
IMAGE_ID = SPECIAL.index("<image>")
# The prompt format of LLaVA-1.5.
CHAT_TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The sizes of a LLaVA-1.5-shaped model: a CLIP tower, two linear layers, a Llama decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    tower_layers: int
    tower_hidden: int
    tower_heads: int
    image: int = 336

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of one image: its patches."""
        return (self.image // PATCH) ** 2


# The tower has about the share of the decoder's FLOPs that it has in LLaVA-1.5-7B (5%).
SIZES = {
    "tiny": Size(4, 64, 160, 4, 2, 32, 2, image=56),
    "small": Size(12, 512, 1376, 8, 8, 128, 4),
    "narrow": Size(6, 256, 688, 4, 4, 64, 2),  # for long prompts and batches on few cores
    "llava-7b": Size(32, 4096, 11008, 32, 24, 1024, 16),
}


def build_model(
    size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A LlavaForConditionalGeneration of this size with seeded random weights."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.tower_hidden,
            intermediate_size=4 * size.tower_hidden,
            num_hidden_layers=size.tower_layers,
            num_attention_heads=size.tower_heads,
            image_size=size.image,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=4096,
            vocab_size=VOCABULARY,
            # Larger than the usual 0.02, so that the answer depends on the prompt.
            initializer_range=size.hidden**-0.5,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_ID,
        image_seq_length=size.vision_tokens,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def build_processor(size: Size) -> Any:
    """The Hugging Face processor of LLaVA-1.5 around a small byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CHAT_TEMPLATE, __doc__ or ""], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    side = {"height": size.image, "width": size.image}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": size.image}, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" removes again
        chat_template=CHAT_TEMPLATE,
    )


def random_inputs(
    size: Size, before: int, after: int, model: nn.Module, batch: int = 1, images: int = 1
) -> Inputs:
    """Random pixels and prompts of images in a row with random text tokens around them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, before + after), generator=generator)
    placeholders = torch.full((batch, images * size.vision_tokens), IMAGE_ID)
    ids = torch.cat([ids[:, :before], placeholders, ids[:, before:]], 1)
    pixels = torch.randn((batch * images, 3, size.image, size.image), generator=generator)
    weight = next(model.parameters())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {k: v.to(weight.device) for k, v in inputs.items()} | {"pixel_values": pixels.to(weight)}


def warm_up(backend: str, device: str) -> None:
    """Pay the one-time cost of a process's first compilation: imports and compiler workers."""
    tiny = torch.compile(lambda x: x.sin() + 1, backend=backend)
    with fresh_cache():
        tiny(torch.randn(8, device=device))


def first_call(call: Callable[[], object], alone: bool) -> dict[str, Any]:
    """Seconds of a first call.

    alone: compile in this process, to report CPU seconds and the number of kernel files as well.
    """
    patched = inductor_config.patch(compile_threads=1) if alone else nullcontext()
    with fresh_cache(), patched:
        before = os.times()
        result: dict[str, Any] = {"seconds": seconds(call)}
        if alone:
            after, folder = os.times(), Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            spent = [b - a for a, b in zip(before, after, strict=True)]
            result |= {"cpu": spent[0] + spent[1], "compiler_cpu": spent[2] + spent[3]}
            result["files"] = len(list(folder.rglob("*.cpp")))
    return result


def prefill(model: Any, inputs: Inputs) -> Any:
    """``generate`` for one new token: vision tower, merge and decoder; no decode step."""
    return model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)


def decode_eagerly(model: Any, inputs: Inputs, tokens: int) -> torch.Tensor:
    """Generate ids with the compiled prefill and eager decode steps; includes the prompt.

    Compiled decoding needs two graphs (the first step's cache has other strides than later ones)
    and, with Inductor on two cores, compiles longer than the prefill.
    """
    first = prefill(model, inputs)
    ids: torch.Tensor = first.sequences
    if tokens > 1:
        with torch.compiler.set_stance("force_eager"):
            ids = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=first.past_key_values,
                max_new_tokens=tokens - 1,
                do_sample=False,
            )
    return ids


def cache_lengths(cache: Any) -> list[int]:
    """The number of tokens in each decoder layer's KV cache."""
    return [layer.keys.shape[-2] for layer in cache.layers]
