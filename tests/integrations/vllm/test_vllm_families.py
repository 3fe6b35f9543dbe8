"""Other families inside vLLM's engine: M-RoPE, images of several sizes, tiles.

Prompts exceed a step's budget and start with the same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dartfx.integrations.vllm import vllm_api
from dartfx.tools.zoo.hooked import pruned_generate, unpruned_generate
from tests.support.serving import vllm_families
from tests.support.serving.vllm_serving import serve

pytestmark = [
    pytest.mark.skipif(vllm_api.installed() is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),
]

RETAIN = 6
PREFIX = "what is this red blue digit one two " * 5
BLOCK = 32
TEXT = 5  # "what is", "this" and the two tokens around a picture
SIZES = [(224, 168), (140, 224), (224, 224)]


@torch.no_grad()
def oracle(model: Any, processor: Any, request: Any, retain: int | None) -> list[int]:
    """Greedy tokens of transformers, pruned by hooks or, for None, unpruned."""
    text, pictures, tokens = request
    if pictures:
        images = [Image.open(picture) for picture in pictures]
        inputs = processor(images=images, text=[text], return_tensors="pt")
    else:
        inputs = processor.tokenizer([text], return_tensors="pt")
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    if retain is None or not pictures:
        made = unpruned_generate(model, inputs, max_new_tokens=tokens)
    else:
        made = pruned_generate(
            model, inputs, retain=retain, max_new_tokens=tokens, kv_layout="layered"
        )
    found: list[int] = made.logits.argmax(-1)[0].tolist()
    return found


@pytest.mark.parametrize("runner", ["V1", pytest.param("V2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", vllm_families.FAMILIES)
def test_tokens_are_those_of_the_oracle(name: str, runner: str, tmp_path: Path) -> None:
    model, processor, picture = vllm_families.save(name, tmp_path)
    model.generation_config.eos_token_id = None
    paths = [str(tmp_path / f"{number}.png") for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        Image.effect_noise(size, 80.0).convert("RGB").save(path)
    batch = [
        [f"what is {picture} this red ?", paths[:1], 6],
        [f"{picture} where is the digit one", paths[1:2], 9],
        ["what is red", [], 5],
        [f"a {picture} or {picture} row two", paths[1:], 7],
    ]
    batch = [[PREFIX + text, pictures, tokens] for text, pictures, tokens in batch]
    pruned = {"additional_config": {"dartfx": {"retain_tokens": RETAIN}}}
    run = serve(
        tmp_path, batch, runner=runner, model=str(tmp_path), max_model_len=512, block_size=BLOCK,
        max_num_batched_tokens=64, **pruned,
    )  # fmt: skip
    wanted = [oracle(model, processor, each, RETAIN) for each in batch]
    assert run["tokens"] == wanted
    assert wanted != [oracle(model, processor, each, None) for each in batch]
    assert run["chunks"] > 0
    assert run["cached"] == [0, BLOCK, BLOCK, BLOCK]
    assert run["groups"] == ["BeforeCutSpec", "BehindCutSpec"]


def test_blocks_held_at_the_peak(tmp_path: Path) -> None:
    """One request at a time: what layers before and behind the cut store of the largest one."""
    _, _, picture = vllm_families.save("qwen2_5_vl", tmp_path)
    paths = [str(tmp_path / f"{number}.png") for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        Image.effect_noise(size, 80.0).convert("RGB").save(path)
    batch = [[f"what is {picture} this", [path], 40] for path in paths]
    pruned = {"additional_config": {"dartfx": {"retain_tokens": RETAIN}}}
    run = serve(
        tmp_path, batch, model=str(tmp_path), max_model_len=512, max_num_seqs=1,
        enable_prefix_caching=False, **pruned,
    )  # fmt: skip
    assert run["groups"] == ["BeforeCutSpec", "BehindCutSpec"]
    peaks = []
    for prompt, (_, _, tokens) in zip(run["prompts"], batch, strict=True):
        vision = prompt - TEXT
        stored = prompt + tokens - 1, prompt - vision + RETAIN + tokens - 1
        peaks.append(sum(-(-count // BLOCK) for count in stored))
    assert run["peak"] == max(peaks)
    unpruned = max(2 * -(-(prompt + 39) // BLOCK) for prompt in run["prompts"])
    assert run["peak"] < unpruned
