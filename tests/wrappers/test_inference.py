"""Inference: pipelines, inference mode, memory formats, a server."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}
ONCE = {"max_new_tokens": 2, "do_sample": False}


def chat(question: str) -> list[dict[str, Any]]:
    torch.manual_seed(len(question))
    image = Image.fromarray(torch.randint(256, (56, 56, 3), dtype=torch.uint8).numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_pipeline_single_and_batched(saved: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    processor = AutoProcessor.from_pretrained(saved)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(saved).eval()
    chats = [chat("what?"), chat("and what is shown here?")]
    expected = []
    for one in chats:
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        # Uniform caches, as a padded batch needs them: each row then answers as it does alone.
        made = hooked.pruned_generate(
            model, dict(inputs), retain=RETAIN, max_new_tokens=2, kv_layout="uniform"
        )
        expected.append(processor.decode(made.token_ids[0], skip_special_tokens=True))
    dartfx.compile(model, kv_layout="uniform", **OPTIONS)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    alone = [pipe(text=one, return_full_text=False, generate_kwargs=ONCE) for one in chats]
    assert [answer[0]["generated_text"] for answer in alone] == expected
    batched = pipe(text=chats, batch_size=2, return_full_text=False, generate_kwargs=ONCE)
    assert [answer[0]["generated_text"] for answer in batched] == expected
    assert {r.outcome.batch for r in dartfx.reports() if r.pruned} == {1, 2}


def test_channels_last() -> None:
    """Inference mode is in ``test_inputs_and_outputs.py``."""
    built = load("llava", layers=3)
    inputs = built.make_inputs("one")
    expected = hooked.pruned_forward(built.model, inputs, retain=RETAIN).logits
    dartfx.compile(built.model, **OPTIONS)
    built.model.to(memory_format=torch.channels_last)
    inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = built.model(**inputs).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert any(report.pruned for report in dartfx.reports())


def test_streamers_in_threads() -> None:
    """As a server answers two clients at once: generate in a thread, its tokens by a streamer."""
    built = load("llava", layers=3)
    prompts = [built.make_inputs("one", seed=seed) for seed in (1, 2)]
    expected = [
        hooked.pruned_generate(
            built.model, inputs, retain=RETAIN, max_new_tokens=2, kv_layout="uniform"
        ).token_ids[0]
        for inputs in prompts
    ]
    dartfx.compile(built.model, **OPTIONS)

    def answer(inputs: dict[str, Any]) -> torch.Tensor:
        streamer = Streamer()
        built.model.generate(**inputs, **ONCE, streamer=streamer)
        return torch.cat(streamer.tokens[1:])  # the prompt comes first

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            for tokens, wanted in zip(threads.map(answer, prompts), expected, strict=True):
                assert torch.equal(tokens, wanted)
    assert any(report.pruned for report in dartfx.reports())


class Streamer:
    """What ``generate`` gives each token to."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        pass


def compilations() -> int:
    return sum(report.pruned for report in dartfx.reports())


def with_images(built: Family, count: int) -> dict[str, Any]:
    """One prompt of ``count`` images with a word between them."""
    ids = [2, 3]
    for number in range(count):
        ids += [*[built.image_token_id] * built.tokens_per_image, 10 + number]
    pixels = torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count))
    return {"input_ids": torch.tensor([[*ids, 4, 5]]), "pixel_values": pixels}


@pytest.mark.slow
@torch.no_grad()
def test_one_to_fifty_images() -> None:
    """transformers splits LLaVA's features by image, in Python, so each number is compiled once."""
    built = load("llava", layers=3)
    plain = copy.deepcopy(built.model)
    dartfx.compile(built.model, **OPTIONS)
    for count in (1, 3, 50, 3):
        inputs = with_images(built, count)
        expected = hooked.pruned_forward(plain, inputs, retain=RETAIN).logits
        torch.testing.assert_close(built.model(**inputs).logits, expected, **CLOSE)
    assert compilations() == 3


@torch.no_grad()
def test_lengths_that_are_marked_dynamic_share_one() -> None:
    built = load("llava", layers=3)
    dartfx.compile(built.model, **OPTIONS)
    for before in (3, 4, 9):
        inputs = built.make_inputs("one", before=before)
        del inputs["attention_mask"]
        torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
        built.model(**inputs)
    assert compilations() == 1


@pytest.mark.slow
def test_generate_without_a_cache_takes_three_at_most() -> None:
    """``test_generate.py`` holds its tokens against the hooks as well."""
    built = load("llava", layers=3)
    dartfx.compile(built.model, **OPTIONS)
    built.model.generate(
        **built.make_inputs("one"), **ONCE | {"max_new_tokens": 6}, use_cache=False
    )
    assert 1 <= compilations() <= 3
