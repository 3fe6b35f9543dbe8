"""Checks of the hooked oracle itself: against the unpruned model, single rows, and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dartfx.tools.zoo.family import VARIANTS, Family
from dartfx.tools.zoo.hooked import (
    Inputs,
    KvLayout,
    Pruned,
    SelectionInputs,
    pruned_forward,
    pruned_generate,
    take,
    unpruned_forward,
    unpruned_generate,
)
from dartfx.tools.zoo.registry import load
from tests.support.plain.by_hand import prune_by_hand
from tests.support.tolerances import EAGER, RETAIN

STEPS = 5
NAMES = ["llava", "llava_next", "qwen2_5_vl"]
LAYOUTS: list[KvLayout] = ["layered", "uniform"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for threads: 7 times slower with two of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def family(name: str, **overrides: Any) -> Family:
    return load(name, **overrides)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **EAGER)


def with_positions(inputs: Inputs) -> Inputs:
    """What ``generate`` adds by itself: the first valid token of a padded row is at position 0."""
    if "mm_token_type_ids" in inputs:  # M-RoPE models count from the mask in forward as well
        return inputs
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions}


def grown(inputs: Inputs, token_ids: Tensor) -> Inputs:
    """The prompt followed by text tokens, as one longer prompt."""
    more = {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "mm_token_type_ids": torch.zeros_like(token_ids, dtype=torch.int32),
    }
    return {k: torch.cat([v, more[k]], 1) if k in more else v for k, v in inputs.items()}


def assert_same(ours: Pruned, theirs: Pruned) -> None:
    for one, other in zip(
        [ours.logits, *ours.keys, *ours.values, ours.keep_idx],
        [theirs.logits, *theirs.keys, *theirs.values, theirs.keep_idx],
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["one", "two", "pad2", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(
    name: str, variant: str, kv_layout: KvLayout
) -> None:
    model, inputs = family(name).model, family(name).make_inputs(variant)
    retain = inputs["input_ids"].shape[1]
    plain = unpruned_forward(model, inputs)
    assert_same(pruned_forward(model, inputs, retain=retain, kv_layout=kv_layout), plain)
    if variant == "pad2" and kv_layout == "layered":
        return
    ours = pruned_generate(model, inputs, retain=retain, max_new_tokens=STEPS, kv_layout=kv_layout)
    theirs = unpruned_generate(model, inputs, max_new_tokens=STEPS)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.kv_lengths == theirs.kv_lengths


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("variant", ["one", "two"])
@pytest.mark.parametrize("name", NAMES)
def test_kv_lengths_and_kept_tokens(name: str, variant: str, layer: int) -> None:
    fam = family(name)
    inputs = fam.make_inputs(variant)
    ids = inputs["input_ids"]
    full = ids.shape[1]
    vision = ids[0] == fam.image_token_id
    short = full - int(vision.sum()) + RETAIN
    layered = pruned_forward(fam.model, inputs, layer=layer, retain=RETAIN)
    uniform = pruned_forward(fam.model, inputs, layer=layer, retain=RETAIN, kv_layout="uniform")
    assert layered.kv_lengths == [full] * layer + [short] * (4 - layer)
    assert uniform.kv_lengths == [short] * 4
    assert torch.equal(layered.logits, uniform.logits)
    assert layered.logits.shape[1] == short
    keep = layered.keep_idx[0]
    assert keep.tolist() == sorted(set(keep.tolist()))
    assert int(vision[keep].sum()) == RETAIN
    assert set((~vision).nonzero().flatten().tolist()) <= set(keep.tolist())
    for before, after in zip(layered.keys[:layer], uniform.keys[:layer], strict=True):
        assert torch.equal(before[:, :, keep], after)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("variant", ["one", "two", "pad2", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_matches_layers_run_by_hand(name: str, variant: str, layer: int) -> None:
    fam = family(name)
    inputs = with_positions(fam.make_inputs(variant))
    ours = pruned_forward(fam.model, inputs, layer=layer, retain=RETAIN)
    prompt = inputs["input_ids"].shape[1]
    logits, keep, selection_inputs = prune_by_hand(
        fam, inputs, prompt, layer=layer, kv_layout="layered"
    )
    assert torch.equal(ours.keep_idx, keep)
    real = inputs["attention_mask"].bool().gather(1, keep)
    assert_close(ours.logits[real], logits[real])
    assert_close(
        ours.hidden[selection_inputs.valid], selection_inputs.hidden[selection_inputs.valid]
    )
    columns = selection_inputs.valid[:, None].expand(ours.score_keys.shape[:3])
    assert_close(ours.score_keys[columns], selection_inputs.keys[columns])
    plain = unpruned_forward(fam.model, inputs, layer=layer)
    assert torch.equal(ours.hidden, plain.hidden)
    assert (ours.logits - take(plain.logits, keep, 1))[real].abs().max() > 0.05


@pytest.mark.parametrize(
    ("variant", "kv_layout"),
    [
        ("one", "layered"),
        ("one", "uniform"),
        ("two", "layered"),
        ("pad2", "uniform"),
        ("ragged", "uniform"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_generate_matches_a_loop_by_hand_without_a_cache(
    name: str, variant: str, kv_layout: KvLayout
) -> None:
    fam = family(name)
    inputs = fam.make_inputs(variant)
    prompt = inputs["input_ids"].shape[1]
    ours = pruned_generate(
        fam.model, inputs, retain=RETAIN, max_new_tokens=STEPS, kv_layout=kv_layout
    )
    tokens = inputs["input_ids"][:, :0]
    for step in range(STEPS):
        longer = with_positions(grown(inputs, tokens))
        logits, keep, _ = prune_by_hand(fam, longer, prompt, layer=2, kv_layout=kv_layout)
        assert torch.equal(ours.keep_idx, keep)
        assert_close(ours.logits[:, step], logits[:, -1])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours.token_ids, tokens)
    seen = keep.shape[1] + STEPS - 1
    early = seen if kv_layout == "uniform" else prompt + STEPS - 1
    assert ours.kv_lengths == [early] * 2 + [seen] * 2


@pytest.mark.parametrize("variant", ["pad2", "pad4"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_generates_what_it_generates_alone(name: str, variant: str) -> None:
    fam = family(name)
    inputs = fam.make_inputs(variant)
    batch = pruned_generate(
        fam.model, inputs, retain=RETAIN, max_new_tokens=STEPS, kv_layout="uniform"
    )
    for row in range(inputs["input_ids"].shape[0]):
        alone = fam.row(inputs, row)
        solo = pruned_generate(
            fam.model, alone, retain=RETAIN, max_new_tokens=STEPS, kv_layout="uniform"
        )
        pads = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        assert torch.equal(batch.keep_idx[row, pads:] - pads, solo.keep_idx[0])
        assert torch.equal(batch.token_ids[row], solo.token_ids[0])
        assert_close(batch.logits[row], solo.logits[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_row_keeps_its_text_and_prefills_as_alone(name: str) -> None:
    fam = family(name)
    inputs = with_positions(fam.make_inputs("ragged"))
    batch = pruned_forward(fam.model, inputs, retain=RETAIN)
    share = fam.tokens_per_image // 2  # row 0 has this many more vision tokens than the mean
    for row, retain in enumerate([RETAIN + share, RETAIN]):
        alone = fam.row({k: v for k, v in inputs.items() if k != "position_ids"}, row)
        solo = pruned_forward(fam.model, alone, retain=retain)
        kept = solo.keep_idx.shape[1]
        pads = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        assert torch.equal(batch.keep_idx[row, -kept:] - pads, solo.keep_idx[0])
        assert_close(batch.logits[row, -kept:], solo.logits[0])


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention_prunes_the_same(name: str) -> None:
    sdpa, eager = family(name), family(name, attn_implementation="eager")
    inputs = sdpa.make_inputs("one")
    size: dict[str, Any] = {"retain": RETAIN, "max_new_tokens": STEPS, "kv_layout": "uniform"}
    one = pruned_generate(sdpa.model, inputs, **size)
    other = pruned_generate(eager.model, inputs, **size)
    assert torch.equal(one.token_ids, other.token_ids)
    assert_close(one.logits, other.logits)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 48, "vocab_size": 64},
        {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 48},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "layers": 5},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_coincide_change_nothing(name: str, sizes: dict[str, int]) -> None:
    fam = load(name, **sizes)
    for length in {sizes.get("hidden_size", 64), 48}:
        inputs = fam.make_inputs("one", length=max(length, 40))
        ours = pruned_forward(fam.model, inputs, retain=RETAIN)
        width = inputs["input_ids"].shape[1]
        logits, keep, _ = prune_by_hand(fam, inputs, width, layer=2, kv_layout="layered")
        assert torch.equal(ours.keep_idx, keep)
        assert_close(ours.logits, logits)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_have_the_shapes_they_promise(name: str) -> None:
    fam = family(name)
    inputs = {variant: fam.make_inputs(variant) for variant in VARIANTS}
    one, text = inputs["one"], inputs["text"]
    assert one["input_ids"].shape == text["input_ids"].shape
    assert not (text["input_ids"] == fam.image_token_id).any()
    assert "pixel_values" not in text
    assert fam.make_inputs("one", length=64)["input_ids"].shape == (1, 64)
    assert fam.make_inputs("one", before=9, after=3)["input_ids"].shape != one["input_ids"].shape
    again = fam.make_inputs("one")
    assert all(torch.equal(one[key], again[key]) for key in one)
    for rows in (2, 4):
        padded = inputs[f"pad{rows}"]["attention_mask"]
        assert padded.shape[0] == rows
        assert padded[0].all()
        assert (padded[1:, 0] == 0).all()


def test_wrong_requests_are_refused_by_name() -> None:
    fam = family("llava")
    one, pad2 = (fam.make_inputs(v) for v in ("one", "pad2"))
    how: dict[str, Any] = {"retain": RETAIN, "max_new_tokens": 2, "kv_layout": "layered"}
    with pytest.raises(ValueError, match="kv_layout='uniform'"):
        pruned_generate(fam.model, pad2, **how)
    eager = family("llava", attn_implementation="eager").model
    with pytest.raises(ValueError, match="eager attention"):
        pruned_generate(eager, one, **how)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match=f"layer={layer}"):
            pruned_forward(fam.model, one, layer=layer, retain=RETAIN)
    with pytest.raises(ValueError, match="unknown variant"):
        fam.make_inputs("three")
    with pytest.raises(ValueError, match="leaves no text"):
        fam.make_inputs("one", length=16)


def test_hooks_are_gone_after_a_failure() -> None:
    fam = family("llava")
    inputs = fam.make_inputs("one")
    before = unpruned_forward(fam.model, inputs)

    def broken(selection_inputs: SelectionInputs, retain: int) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        pruned_forward(fam.model, inputs, retain=RETAIN, selector=broken)
    assert_same(unpruned_forward(fam.model, inputs), before)
