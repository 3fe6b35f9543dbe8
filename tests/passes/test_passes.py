"""The rewritten graph against the same decoder pruned by hand, in many variants."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dartfx.passes.frontend.normalise import fresh_size, with_own_symbols
from dartfx.passes.outcome import Pruned, Unchanged
from dartfx.passes.refusal import Declined
from tests.support.plain.decoders import (
    Decoder,
    Sizes,
    Style,
    assert_same,
    prompt,
    pruned_by_hand,
    run,
)
from tests.support.plain.spellings import JOINS, MLPS, SPLITS

RETAIN = 5


def assert_pruned_like_by_hand(
    z: Sizes, style: Style, *, retain: int = RETAIN, layer: int = 2, pads: tuple[int, ...] = ()
) -> Pruned:
    """One call, compiled and by hand; auto layout is uniform for a batch or a mask."""
    model, inputs = Decoder(z, style).eval(), prompt(z, pads)
    outputs, outcome = run(model, inputs, retain_tokens=retain, layer=layer)
    assert isinstance(outcome, Pruned), outcome
    masked = style.mask != "none"
    with torch.no_grad():
        expected = pruned_by_hand(
            model, inputs, retain, layer, known_valid=masked, uniform=masked or z.batch > 1
        )
    assert_same(outputs, expected)
    assert outcome.sequence == (z.seq, z.seq - z.vision + retain)
    assert (outcome.vision_tokens, outcome.retained) == (z.vision, retain)
    return outcome


BLOCKS = [
    Style(split=split, join=join, mlp=mlp)
    for split, join, mlp in zip(SPLITS, cycle(JOINS), cycle(MLPS), strict=False)
]


BATCHED = [(s, 2) for s in BLOCKS if s.split not in ("view", "reshape", "unflatten")]


@pytest.mark.parametrize(
    ("style", "batch"),
    [(s, 1) for s in BLOCKS] + BATCHED,
    ids=lambda v: f"{v.split}-{v.join}-{v.mlp}" if isinstance(v, Style) else f"batch={v}",
)
def test_block(style: Style, batch: int) -> None:
    assert_pruned_like_by_hand(Sizes(batch=batch), style)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rope", ["batched", "one_row"])
def test_rotary_tables(rope: str, batch: int) -> None:
    assert_pruned_like_by_hand(Sizes(batch=batch), Style(rope=rope, norm="rms"))


def test_rotary_table_without_batch_dim() -> None:
    assert_pruned_like_by_hand(Sizes(), Style(rope="flat"))


@pytest.mark.parametrize("attend", ["sdpa", "repeated", "softmax"])
def test_grouped_heads(attend: str) -> None:
    assert_pruned_like_by_hand(Sizes(heads=4, kv_heads=2, batch=2), Style(attend=attend))


@pytest.mark.parametrize("mask", ["4d_bool", "4d_float"])
@pytest.mark.parametrize("pads", [(), (3, 0)])
def test_mask(mask: str, pads: tuple[int, ...]) -> None:
    attend = "softmax" if mask == "4d_float" else "sdpa"
    assert_pruned_like_by_hand(
        Sizes(batch=len(pads) or 1), Style(attend=attend, mask=mask, rope="one_row"), pads=pads
    )


@pytest.mark.parametrize("extra", ["arange", "table", "residual"])
def test_positions_added_in_every_layer(extra: str) -> None:
    assert_pruned_like_by_hand(Sizes(), Style(extra=extra))


@pytest.mark.parametrize("layer", [1, 2])
def test_any_layer(layer: int) -> None:
    assert_pruned_like_by_hand(Sizes(), Style(), layer=layer)


def test_no_vision_token_retained() -> None:
    assert_pruned_like_by_hand(Sizes(), Style(), retain=0)


COINCIDENCES = {
    "seq=hidden": Sizes(seq=16, vision=8),
    "seq=heads*head_dim": Sizes(seq=32, vision=20, heads=4, kv_heads=4),
    "seq=head_dim": Sizes(seq=24, head_dim=24),
    "seq=heads": Sizes(seq=12, vision=6, heads=12, kv_heads=12, head_dim=4),
    "seq=vocab": Sizes(seq=24, vocab=24),
    "seq=inner": Sizes(seq=24, inner=24),
    "batch=seq": Sizes(batch=12, seq=12, vision=6),
    "batch*seq=inner": Sizes(batch=2, seq=24, inner=48),
    "batch=heads": Sizes(batch=4, heads=4, kv_heads=4),
    "batch=hidden=seq": Sizes(batch=16, seq=16, hidden=16, vision=8),
    "kept=vision": Sizes(seq=19, vision=12),
    "kept=hidden": Sizes(seq=23, vision=12),
    "everything=16": Sizes(16, 16, 8, 16, 16, 16, 16, 16, 16),
}


@pytest.mark.parametrize("z", COINCIDENCES.values(), ids=COINCIDENCES)
def test_sizes_that_coincide(z: Sizes) -> None:
    assert_pruned_like_by_hand(z, Style(split="flat_rows", join="rows", mlp="rows", rope="one_row"))


@pytest.mark.parametrize("retain", [12, 13])
def test_nothing_to_drop(retain: int) -> None:
    model, inputs = Decoder().eval(), prompt(Sizes())
    outputs, outcome = run(model, inputs, retain_tokens=retain)
    assert isinstance(outcome, Unchanged)
    assert "nothing to drop" in outcome.because
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)


def test_every_spelling_is_met() -> None:
    assert {s.split for s in BLOCKS} == set(SPLITS)
    assert {s.join for s in BLOCKS} == set(JOINS)
    assert {s.mlp for s in BLOCKS} == set(MLPS)


def test_declined_is_bit_identical() -> None:
    z, style = Sizes(batch=2), Style(rope="flat")
    model, inputs = Decoder(z, style).eval(), prompt(z)
    outputs, outcome = run(model, inputs, retain_tokens=RETAIN)
    assert isinstance(outcome, Declined)
    assert "no batch dim" in outcome.because
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)


def test_a_symbol_that_a_guard_fixed_is_a_number_in_another_mode() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    free, fixed = fresh_size(mode, 12), fresh_size(mode, 64)
    with mode:
        value = torch.empty(free, fixed)
    assert bool(fixed == 64)  # as dynamo does where a model compares sizes
    size, other, new = with_own_symbols([free, fixed, value])
    assert isinstance(size, torch.SymInt)
    assert (type(other), other) == (int, 64)
    assert new.shape[1] == 64
    assert isinstance(new.shape[0], torch.SymInt)
