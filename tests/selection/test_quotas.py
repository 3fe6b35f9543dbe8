"""Budgets per image, against the float64 oracle run on each image alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.errors import ConfigError, KernelUnavailableError, SelectionError
from dartfx.selection import registry
from dartfx.selection.registry import BUILT_IN
from dartfx.tools.zoo import hooked, oracle
from dartfx.tools.zoo.registry import load
from tests.support.selection_cases import draw, plain
from tests.support.tolerances import CLOSE


def runs(pool: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for p in pool:
        if not found or p != found[-1][-1] + 1:
            found.append([])
        found[-1].append(p)
    return found


def split(budget: int, sizes: list[int], least: list[int]) -> list[int]:
    """Largest remainders of what each could keep beyond its least, ties to the earlier."""
    room = [size - keep for size, keep in zip(sizes, least, strict=True)]
    rest, total = budget - sum(least), sum(room) or 1
    share = [rest * r // total for r in room]
    by_remainder = sorted(range(len(room)), key=lambda i: (-(rest * room[i] % total), i))
    for i in by_remainder[: rest - sum(share)]:
        share[i] += 1
    return [k + s for k, s in zip(least, share, strict=True)]


def expected(
    case: dict[str, Any], quota: Sequence[int] | None = None, min_tokens: int = 1
) -> oracle.Batch:
    hidden, keys = oracle.as_float64(case["hidden"]), oracle.as_float64(case["keys"])
    pivots = case.get("pivot_image_tokens", 4), case.get("pivot_text_tokens", 4)

    def choose(b: int, pool: list[int], after: list[int], budget: int) -> oracle.Selection:
        spans, whole = runs(pool), oracle.Selection([])
        sizes = [len(span) for span in spans]
        least = list(quota) if quota else [min(size, min_tokens) for size in sizes]
        for span, share in zip(spans, split(budget, sizes, least), strict=True):
            one = oracle.select(hidden[b], keys[b], span, after, share, *pivots)
            whole.kept += one.kept
            whole.gaps += one.gaps
        return whole

    return oracle.by_batch_rule(choose, case["vision_mask"], case["retain"], case.get("valid_mask"))


def kept_of(case: dict[str, Any], keep_idx: Tensor) -> list[list[int]]:
    """How many tokens of each image every row keeps."""
    return [
        [len(set(run) & set(keep)) for run in runs(mask.nonzero()[:, 0].tolist())]
        for mask, keep in zip(case["vision_mask"], keep_idx.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_dart_on_each_image(seed: int) -> None:
    case = draw(seed, dtype=torch.float64)
    images = max(len(runs(m.nonzero()[:, 0].tolist())) for m in case["vision_mask"])
    tokens = int(case["vision_mask"].sum()) // len(case["vision_mask"])
    case["retain"] = min(max(case["retain"], images), tokens)
    want = expected(case)
    got = dartfx.select_tokens(**case, quota="image")
    assert got.tolist() == want.keep_idx


def album(retain: int) -> dict[str, Any]:
    """A row of images of 3, 20 and 9 tokens and, behind pads, a row of 24 and 8."""
    case = plain(B=2, S=60, retain=retain)
    case["vision_mask"] = torch.zeros(2, 60, dtype=torch.bool)
    case["valid_mask"] = torch.ones(2, 60, dtype=torch.bool)
    case["valid_mask"][1, :6] = False
    for row, start, end in ((0, 4, 7), (0, 10, 30), (0, 33, 42), (1, 8, 32), (1, 40, 48)):
        case["vision_mask"][row, start:end] = True
    return case


@pytest.mark.parametrize("selector", BUILT_IN)
@pytest.mark.parametrize(
    ("min_tokens", "each"),
    [
        # One each, and the rest by what each could still keep: 2, 19, 8 and 23, 7.
        (1, [[2, 7, 4], [9, 4]]),
        # The first image stays whole.
        (4, [[3, 6, 4], [8, 5]]),
        (0, [[1, 8, 4], [10, 3]]),
    ],
)
def test_every_selector_meets_every_budget(
    selector: str, min_tokens: int, each: list[list[int]]
) -> None:
    case = album(13)
    case["queries"] = torch.randn(2, 4, 60, 8, generator=torch.Generator().manual_seed(1))
    case["tower_attention"] = case["queries"][:, 0, :, 0]
    got = dartfx.select_tokens(**case, selector=selector, quota="image", min_tokens=min_tokens)
    counts = kept_of(case, got)
    assert [sum(row) for row in counts] == [13, 13]
    assert counts == each


def test_joint_starves_an_image_and_quotas_do_not() -> None:
    case = album(5)
    case["hidden"][:, :12] = case["hidden"][:, 50:51]  # the first image is like the text's pivot
    case["keys"] = torch.zeros_like(case["keys"])
    case["keys"][0, :, 10:42] = 1.0
    joint, by_image = (
        kept_of(case, dartfx.select_tokens(**case, quota=q))[0] for q in ("joint", "image")
    )
    assert joint[0] == 0
    assert by_image == split(5, [3, 20, 9], [1, 1, 1])


def test_numbers_for_each_image() -> None:
    case = {**plain(B=2, S=60, retain=12), "vision_mask": torch.zeros(2, 60, dtype=torch.bool)}
    case["vision_mask"][:, 4:20] = True
    case["vision_mask"][:, 30:46] = True
    got = dartfx.select_tokens(**case, quota=[9, 3])
    assert kept_of(case, got) == [[9, 3], [9, 3]]
    assert got.tolist() == expected(case, [9, 3]).keep_idx


@pytest.mark.parametrize(
    ("retain", "options", "said"),
    [
        (2, {"quota": "image"}, "keeps at least 3 tokens of the 3 images of row 0.*budget is 2"),
        (13, {"quota": "image", "min_tokens": 9}, "min_tokens=9 keeps at least 21.*budget is 13"),
        (13, {"quota": [9, 4]}, r"quota=\[9, 4\] has 2 numbers, but row 0 has 3 images"),
        (13, {"quota": [4, 4, 5]}, r"quota\[0\]=4, but image 0 of row 0 has only 3"),
        (0, {"quota": "image"}, "keeps at least 3 tokens of the 3 images of row 0.*budget is 0"),
    ],
)
def test_budgets_that_do_not_fit(retain: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        dartfx.select_tokens(**album(retain), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quota": "images"}, "quota cannot be 'images'.*did you mean 'image'"),
        ({"quota": []}, "quota must hold a number for each image"),
        ({"quota": [4, -1]}, r"quota\[1\] must be an int, at least 1, got -1"),
        ({"quota": [4, 0]}, r"quota\[1\] must be an int, at least 1, got 0"),
        ({"quota": [4, 3], "retain_tokens": 6}, "adds up to 7, but retain_tokens=6"),
        ({"quota": [4, 3], "reduction_ratio": 0.5}, "reduction_ratio both set"),
        ({"quota": [4, 3], "layer": [1, 2], "retain_tokens": [9, 7]}, "layer names 2 cuts"),
        ({"min_tokens": 4}, "min_tokens=4 applies only with quota='image' or"),
        ({"quota": "image", "kernel": "triton"}, "kernel='triton'.*quota='image'"),
    ],
)
def test_options_that_contradict_one_another(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dartfx.DartConfig.from_options(options)


def test_numbers_are_the_budget_and_change_the_fingerprint() -> None:
    numbers = dartfx.DartConfig(quota=[4, 3])  # type: ignore[arg-type]
    assert numbers.retain_tokens == 7
    plain_config = dartfx.DartConfig(retain_tokens=7)
    shared = dartfx.DartConfig(retain_tokens=7, quota="image")
    least = dartfx.DartConfig(retain_tokens=7, quota="image", min_tokens=2)
    prints = [c.fingerprint() for c in (numbers, plain_config, shared, least)]
    assert len(set(prints)) == 4


def test_numbers_that_do_not_add_up_or_hold_nothing() -> None:
    case = {**plain(B=1, S=60, retain=12), "vision_mask": torch.zeros(1, 60, dtype=torch.bool)}
    case["vision_mask"][:, 4:20] = case["vision_mask"][:, 30:46] = True
    with pytest.raises(SelectionError, match=r"quota=\[9, 4\] adds up to 13, but .*row 0 is 12"):
        dartfx.select_tokens(**case, quota=[9, 4])
    with pytest.raises(SelectionError, match=r"quota=\[9, 2\] adds up to 11, but retain is 12"):
        dartfx.select_tokens(**case, quota=[9, 2])
    with pytest.raises(SelectionError, match=r"quota\[1\]=0 leaves nothing"):
        dartfx.select_tokens(**case, quota=[12, 0])


def test_kernels_take_no_quota() -> None:
    with pytest.raises(KernelUnavailableError):
        dartfx.select_tokens(**album(13), quota="image", kernel="triton")


def test_a_selector_that_misses_an_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @dartfx.register_selector("joint_only")
    def first(hidden, keys, vision_mask, text_mask, budget, **pivots):  # type: ignore[no-untyped-def]
        return vision_mask & (vision_mask.cumsum(1) <= budget[:, None] + 1)

    with pytest.raises(SelectionError, match="exactly 2 vision tokens of image 0 in row 0"):
        dartfx.select_tokens(**album(13), selector="joint_only", quota="image")


def by_image(given: hooked.SelectionInputs, retain: int) -> Tensor:
    case = {
        "hidden": given.hidden,
        "keys": given.keys,
        "vision_mask": given.vision,
        "valid_mask": given.valid,
        "retain": retain,
    }
    return torch.tensor(expected(case).keep_idx)


@pytest.mark.slow
def test_generate_from_images_of_unequal_number() -> None:
    family = load("llava")
    inputs = family.make_inputs("ragged")
    reference = hooked.pruned_generate(
        family.model,
        inputs,
        retain=9,
        max_new_tokens=4,
        selector=by_image,
        kv_layout="uniform",
    )
    dartfx.compile(family.model, retain_tokens=9, quota="image", lowering="aot_eager", tokens=True)
    output = family.model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, prompt:], reference.token_ids)
    torch.testing.assert_close(torch.stack(output.logits, 1), reference.logits, **CLOSE)
    images = dartfx.kept_tokens()
    assert all(image.kept for image in images)
    said = dartfx.explain(family.model, **inputs, tokens=True)
    for image in images:
        assert re.search(f"row {image.row}, image {image.image}: {len(image.kept)} of", str(said))
