"""Budgets per frame, and changes since the previous frame, against numpy loops in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.errors import ConfigError, SelectionError
from dartfx.selection.quotas import frames_by
from dartfx.selection.registry import BUILT_IN
from dartfx.token_map.infer_layout import frame_lengths
from dartfx.tools.zoo import hooked, oracle
from dartfx.tools.zoo.registry import load
from tests.selection.test_quotas import kept_of, split
from tests.support.selection_cases import plain
from tests.support.tolerances import CLOSE


def clips() -> tuple[dict[str, Any], list[list[list[int]]]]:
    """A row of three frames of 8 in one run, and behind pads one of 6 and two of 9: the frames."""
    case = plain(B=2, S=60, retain=10)
    case["vision_mask"] = torch.zeros(2, 60, dtype=torch.bool)
    case["valid_mask"] = torch.ones(2, 60, dtype=torch.bool)
    case["valid_mask"][1, :6] = False
    frames = [
        [list(range(4 + 8 * i, 12 + 8 * i)) for i in range(3)],
        [list(range(9, 15)), list(range(15, 24)), list(range(24, 33))],
    ]
    for row, listed in enumerate(frames):
        case["vision_mask"][row, [p for frame in listed for p in frame]] = True
    case["queries"] = torch.randn(2, 4, 60, 8, generator=torch.Generator().manual_seed(1))
    case["tower_attention"] = case["queries"][:, 0, :, 0]
    return case, frames


def newest(
    hidden: Any, frame: Sequence[int], earlier: Sequence[int] | None, share: int
) -> list[int]:
    """The tokens least like those at their places, or like the frame's mean."""
    mean = hidden[list(frame)].mean(0)
    with_what = [hidden[p] for p in earlier] if earlier else [mean] * len(frame)
    likeness = [oracle.cosine(hidden[p], w) for p, w in zip(frame, with_what, strict=True)]
    order = np.argsort(np.array(likeness), kind="stable")
    return [frame[i] for i in order[:share]]


def expected(hidden: Any, frames: list[list[list[int]]], budget: int) -> list[list[int]]:
    kept = []
    for row, listed in enumerate(frames):
        sizes = [len(frame) for frame in listed]
        found: list[int] = []
        for i, share in enumerate(split(budget, sizes, [1] * len(sizes))):
            alike = i > 0 and len(listed[i - 1]) == len(listed[i])
            before = listed[i - 1] if alike else None
            found += newest(hidden[row], listed[i], before, share)
        kept.append(sorted(found))
    return kept


@pytest.mark.parametrize("selector", BUILT_IN)
def test_every_selector_meets_the_budget_of_every_frame(selector: str) -> None:
    case, frames = clips()
    lengths = [len(frame) for row in frames for frame in row]
    runs: list[list[int]] = []

    def known(of: list[int]) -> list[int]:
        runs.append(of)
        return lengths

    with frames_by(known):
        got = dartfx.select_tokens(**case, selector=selector, quota="frame")
    assert runs == [[24, 24]]
    for row, listed in enumerate(frames):
        counts = [len(set(frame) & set(got[row].tolist())) for frame in listed]
        assert counts == split(10, [len(frame) for frame in listed], [1, 1, 1])
    assert [sum(row) for row in kept_of(case, got)] == [10, 10]
    if selector == "changed":
        want = expected(case["hidden"].double().numpy(), frames, 10)
        vision = case["vision_mask"]
        assert want == [[p for p in r if vision[b, p]] for b, r in enumerate(got.tolist())]


def test_frames_that_nobody_knows_are_an_error() -> None:
    case, _ = clips()
    with pytest.raises(SelectionError, match=r"quota='frame' reads where.*dartfx\.compile"):
        dartfx.select_tokens(**case, quota="frame")
    with (
        frames_by(lambda runs: frame_lengths({}, runs)),
        pytest.raises(SelectionError, match=r"quota='frame', but no argument.*quota='image'"),
    ):
        dartfx.select_tokens(**case, quota="frame")
    with pytest.raises(SelectionError, match=r"quota must be 'frame' or 'image' for .*'changed'"):
        dartfx.select_tokens(**case, selector="changed")
    with pytest.raises(SelectionError, match=r"quota='frames' is none of 'joint', 'image'"):
        dartfx.select_tokens(**case, quota="frames")
    with pytest.raises(ConfigError, match=r"'changed' compares each frame.*quota is 'joint'"):
        dartfx.DartConfig(selector="changed")
    assert dartfx.DartConfig(selector="changed", quota="frame", min_tokens=2).min_tokens == 2


def test_frames_come_from_grids_and_from_pixels() -> None:
    assert frame_lengths({"video_grid_thw": torch.tensor([[3, 4, 8]])}, [24]) == [8, 8, 8]
    pixels = {"pixel_values_videos": torch.zeros(1, 4, 3, 12, 12)}
    assert frame_lengths(pixels, [36]) == [9, 9, 9, 9]
    assert frame_lengths({"pixel_values": torch.zeros(2, 3, 12, 12)}, [9, 9]) == [9, 9]


def clip_of(family: Any) -> dict[str, Any]:
    """The family's prompt with one image, as one with a video of two frames."""
    inputs: dict[str, Any] = family.make_inputs("one")
    video = family.model.config.video_token_id
    inputs["input_ids"][inputs["input_ids"] == family.image_token_id] = video
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    _, rows, columns = inputs.pop("image_grid_thw")[0].tolist()
    inputs["video_grid_thw"] = torch.tensor([[2, rows // 2, columns]])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == video).int() * 2
    return inputs


def by_frame(given: hooked.SelectionInputs, retain: int) -> Tensor:
    pool = given.vision[0].nonzero()[:, 0].tolist()
    frames = [[pool[: len(pool) // 2], pool[len(pool) // 2 :]]]
    (kept,) = expected(given.hidden.double().numpy(), frames, retain)
    text = (~given.vision[0]).nonzero()[:, 0].tolist()
    return torch.tensor([sorted(kept + text)])


def test_generate_from_a_video() -> None:
    """Frames from the call's video_grid_thw, in the product against hooks."""
    family = load("qwen2_5_vl", layers=3)
    model, inputs = family.model, clip_of(family)
    reference = hooked.pruned_generate(
        model,
        inputs,
        retain=6,
        max_new_tokens=1,
        selector=by_frame,
        kv_layout="uniform",
        image_token_id=model.config.video_token_id,
    )
    dartfx.compile(
        model, retain_tokens=6, quota="frame", selector="changed", lowering="eager", tokens=True
    )
    output = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(torch.stack(output.logits, 1), reference.logits, **CLOSE)
    once: dict[str, Any] = {**inputs, "max_new_tokens": 1}
    torch.compiler.reset()
    (clip,) = dartfx.explain(model.generate, **once, tokens=True).tokens
    assert clip.by_view == (3, 3)
    assert str(clip).endswith("6 of 16 kept, by frame or view: 3, 3")
