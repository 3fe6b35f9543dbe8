"""Shapes of users' inputs: paddings, ragged rows, many images, videos, sizes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family, Inputs
from tests.support.families import (
    MAIN,
    NAMES,
    assert_same_forward,
    assert_same_generate,
    compiled,
    family,
    fresh,
    generate,
    padded_right,
    pruned_reports,
    qwen_prompt,
    tower_outside,
    without_mask,
)
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

# Each quick test is of one shape; what two quick tests cover together is slow.

# --- batches and padding --------------------------------------------------------------------


@pytest.mark.parametrize("name", MAIN)
def test_padding_on_the_right(name: str) -> None:
    assert_same_forward(family(name), padded_right(family(name).make_inputs("pad4")))


@functools.cache
def forwarded(name: str) -> Family:
    """The family for a forward: its tower's own breaks are in the test above."""
    built = fresh(name)
    tower_outside(built.model)
    return built


@pytest.mark.parametrize("name", MAIN)
def test_a_batch_without_a_mask(name: str) -> None:
    built = forwarded(name)
    one = built.make_inputs()
    batch = {k: torch.cat([v, v]) for k, v in without_mask(one).items()}
    batch["input_ids"][1, 0] += 1
    assert_same_forward(built, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_padded_and_batched(name: str) -> None:
    """As are the hooks' (``test_hooked.py``).  A batch of four is in ``test_generate.py``, too."""
    built = family(name)
    batch = built.make_inputs("pad4")
    together = assert_same_generate(built, batch)
    torch.compiler.reset()
    dartfx.reset()
    # The last row has most pads.  Alone, "auto" would be layered: decode then sees all tokens in
    # the first two layers.
    alone = assert_same_generate(built, built.row(batch, 3), "uniform")
    torch.testing.assert_close(together[3:], alone, **CLOSE)


def with_a_row_of_text(built: Family) -> Inputs:
    """Row 0 with two images, row 1 with none."""
    inputs = built.make_inputs("two")
    text = torch.full_like(inputs["input_ids"], built.text_ids.start)
    text[0, ::2] += 1
    added = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if built.structure.types:
        added[built.structure.types] = torch.zeros_like(text, dtype=torch.int)
    return inputs | {k: torch.cat([inputs[k], v]) for k, v in added.items()}


@pytest.mark.parametrize("name", MAIN)
def test_rows_with_different_numbers_of_images(name: str) -> None:
    """``generate`` of them is in ``test_generate.py``."""
    assert_same_forward(forwarded(name), forwarded(name).make_inputs("ragged"))


@pytest.mark.parametrize("name", ["llava", *slow("internvl")])
def test_a_row_without_images_fails_naming_it(name: str) -> None:
    """Its text is as long as the longest row, so there is no padding to give way."""
    with (
        compiled(family(name).model) as model,
        pytest.raises(dartfx.SelectionError, match="row 1"),
    ):
        model(**with_a_row_of_text(family(name)), use_cache=False)


# --- images and videos ----------------------------------------------------------------------


def many_images(built: Family, count: int, gap: int = 3, after: int = 6) -> Inputs:
    """One row: ``count`` images with text between."""
    parts = built.structure
    ids = [*range(2, 7)]
    for number in range(count):
        ids += [*parts.image_prefix, *[parts.image_token_id] * parts.tokens_per_image]
        ids += [*parts.image_suffix, *range(10 + number, 10 + number + gap)]
    ids += [*range(30, 30 + after)]
    inputs: Inputs = {"input_ids": torch.tensor([ids])}
    if parts.types:
        inputs[parts.types] = (inputs["input_ids"] == parts.image_token_id).int()
    return inputs | parts.pixels(count, torch.Generator().manual_seed(count))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_three_images_with_text_between(name: str) -> None:
    assert_same_generate(family(name), many_images(family(name), 3))


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("qwen3_vl")])
def test_a_video_of_qwen(name: str) -> None:
    built = family(name)
    # Qwen3-VL writes timestamps between frames, so each frame is a grid of its own there.
    inputs = qwen_prompt(built, (3 if name == "qwen2_5_vl" else 1, 4, 8), video=True)
    assert_same_generate(built, inputs, image_token_id=built.model.config.video_token_id)


@pytest.mark.slow
def test_a_video_of_the_llava_line() -> None:
    built = family("llava_next_video")
    assert_same_generate(built, built.make_inputs(), image_token_id=built.image_token_id)


GRIDS = [(1, 4 + 2 * (i % 4), 8 + 2 * (i % 3)) for i in range(10)]


def ten_prompts(built: Family) -> list[Inputs]:
    """Different prompt lengths, and images of different sizes where the model takes those."""
    if built.structure.types:
        return [qwen_prompt(built, grid, 5 + 2 * i) for i, grid in enumerate(GRIDS)]
    tiles = [1 + i % 3 for i in range(10)] if built.name == "internvl" else [1] * 10
    return [many_images(built, n, after=4 + 3 * i) for i, n in enumerate(tiles)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_sizes_take_at_most_three_compilations(name: str) -> None:
    """Ten lengths of one image are in ``test_generate.py``."""
    built = family(name)
    prompts = ten_prompts(built)
    where: Any = {"retain": RETAIN, "max_new_tokens": 2, "kv_layout": "uniform"}
    oracles = [hooked.pruned_generate(built.model, inputs, **where) for inputs in prompts]
    with compiled(built.model) as model:
        for inputs, oracle in zip(prompts, oracles, strict=True):
            torch.testing.assert_close(generate(model, inputs), oracle.logits, **CLOSE)
    assert 1 <= len(pruned_reports()) <= 3
