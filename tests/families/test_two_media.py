"""Image and video, or image and audio, in one prompt: their union is pruned as by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.observe import report
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.hooks import Hooks
from dartfx.tools.zoo.registry import load
from tests.support.families import tower_outside
from tests.support.tolerances import CLOSE

pytestmark = pytest.mark.slow

RETAIN, STEPS = 8, 3


def prompt(family: Family, video_first: bool) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a call with both, and where their tokens are [1, S]."""
    inputs, count = family.make_inputs("two"), family.tokens_per_image
    ids, pixels, grid = (inputs[n] for n in ("input_ids", "pixel_values", "image_grid_thw"))
    vision = ids == family.image_token_id
    at = vision.nonzero()[:, 1]
    of_video = at[:count] if video_first else at[count:]
    ids[0, of_video] = family.model.config.video_token_id
    inputs["mm_token_type_ids"][0, of_video] = 2
    halves = pixels.chunk(2)
    inputs["pixel_values"], inputs["pixel_values_videos"] = (
        halves[video_first],
        halves[1 - video_first],
    )
    inputs["image_grid_thw"], inputs["video_grid_thw"] = grid[:1], grid[1:]
    del inputs["attention_mask"]
    return inputs, vision


def prompt_with_sound(family: Family, sound_first: bool) -> tuple[dict[str, Any], Tensor]:
    """The same with an image and six tokens of sound."""
    inputs, config = family.make_inputs("one"), family.model.config
    sound = [config.audio_start_token_id, *[config.audio_token_id] * 6, config.audio_end_token_id]
    (ids,) = inputs["input_ids"].tolist()
    at = 2 if sound_first else len(ids) - 3
    inputs["input_ids"] = torch.tensor([[*ids[:at], *sound, *ids[at:]]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["input_features"] = torch.randn(1, config.audio_config.num_mel_bins, 24)
    inputs["feature_attention_mask"] = torch.ones(1, 24, dtype=torch.int64)
    ids = inputs["input_ids"]
    return inputs, (ids == family.image_token_id) | (ids == config.audio_token_id)


@pytest.mark.parametrize("video_first", [False, True], ids=["image first", "video first"])
def test_image_and_video(video_first: bool) -> None:
    family = load("qwen2_5_vl", layers=3)
    tower_outside(family.model)
    check(family, *prompt(family, video_first))


@pytest.mark.parametrize("sound_first", [False, True], ids=["image first", "sound first"])
def test_image_and_sound(sound_first: bool) -> None:
    family = load("qwen2_5_omni", layers=3)
    tower_outside(family.model)
    check(family, *prompt_with_sound(family, sound_first))


def check(family: Family, inputs: dict[str, Any], vision: Tensor) -> None:
    """Both compiled paths, and ``generate``, against hooks that prune where ``vision`` says."""
    dartfx.compile(family.model, retain_tokens=RETAIN, layer=2, lowering="eager")
    with torch.no_grad():
        logits = family.model(**inputs).logits
        output = family.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    dartfx.uncompile(family.model)
    pruned = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert [(p.vision_tokens, p.retained) for p in pruned] == [(int(vision.sum()), RETAIN)] * 2

    def hooks() -> Hooks:
        made = Hooks(family.model, inputs, 2, RETAIN, hooked.float64_selector,
                     image_token_id=family.image_token_id)  # fmt: skip
        made.vision = vision  # of both
        return made

    bare = torch.compile(
        family.model, backend="dart", options={"retain_tokens": RETAIN, "lowering": "eager"}
    )
    report.clear()
    with torch.no_grad():
        alike = bare(**inputs).logits
    pruned = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    assert [(p.vision_tokens, p.retained) for p in pruned] == [(int(vision.sum()), RETAIN)]
    forward = hooked._forward(family.model, inputs, hooks(), "layered")
    torch.testing.assert_close(alike, forward.logits, **CLOSE)
    torch.testing.assert_close(logits, forward.logits, **CLOSE)
    generated = hooked._generate(family.model, inputs, hooks(), "uniform", STEPS)
    torch.testing.assert_close(torch.stack(output.logits, 1), generated.logits, **CLOSE)
