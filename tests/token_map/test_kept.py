"""Records of kept tokens against the oracle, and that recording changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.backend.lowering import lower, lowering_with
from dartfx.errors import ConfigError, DartfxError
from dartfx.passes.outcome import Pruned
from dartfx.token_map.layout import Cell, Layout, merged
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import (
    Decoder,
    Halves,
    Inputs,
    Sizes,
    Style,
    assert_same,
    by_operator,
    compiled,
    prompt,
    pruned_by_hand,
    run,
)
from tests.support.selection_cases import draw, expected

VISION, RETAIN, START = 12, 5, 2


@pytest.mark.parametrize("seed", range(40))
def test_pickers_are_the_oracles(seed: int) -> None:
    case = draw(seed)
    wanted = expected(case)
    if wanted.gap < 1e-5:
        pytest.skip("a tie that rounding decides")
    vision = case["vision_mask"]
    picker = torch.ops.dartfx.picked_by(
        case["hidden"], case["keys"], vision, case["valid_mask"],
        int(vision.sum()) // vision.shape[0], case["retain"],
        case["pivot_image_tokens"], case["pivot_text_tokens"],
    )  # fmt: skip
    for row, found, is_vision in zip(wanted.rows, picker.tolist(), vision.tolist(), strict=True):
        picks = {p: p for p in (*row.image_pivots, *row.text_pivots)}
        picks |= {token: pivot for pivot, tokens in row.picks for token in tokens}
        kept = {i: p for i, p in enumerate(found) if p >= 0}
        # With nothing left to pick the oracle names no text pivots.
        assert {i: p for i, p in kept.items() if i in picks} == picks
        assert all(p == i and not is_vision[i] for i, p in kept.items() if i not in picks)


def by_hand(model: Decoder, inputs: Inputs) -> tuple[Any, Tensor]:
    """The pruned outputs and keep_idx of the decoder pruned by indexing."""
    chosen = []

    def select(*evidence: Any) -> Tensor:
        chosen.append(by_operator(*evidence))
        return chosen[0]

    with torch.no_grad():
        uniform = inputs["ids"].shape[0] > 1
        outputs = pruned_by_hand(model, inputs, RETAIN, select=select, uniform=uniform)
    return outputs, chosen[0]


@pytest.mark.parametrize(
    "lowering", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_recorded_is_what_was_kept_and_outputs_are_the_same(lowering: str) -> None:
    model, inputs = Decoder(), prompt(Sizes(batch=2))
    wanted, keep_idx = by_hand(model, inputs)
    outputs, outcome = run(model, inputs, retain_tokens=RETAIN, tokens=True, lowering=lowering)
    assert isinstance(outcome, Pruned)
    assert_same(outputs, wanted)
    found = dartfx.kept_tokens()
    assert [(k.row, k.image) for k in found] == [(0, 0), (1, 0)]
    for kept, row in zip(found, keep_idx.tolist(), strict=True):
        assert kept.positions == tuple(range(START, START + VISION))
        assert kept.kept == tuple(p - START for p in row if START <= p < START + VISION)
        assert len(kept.kept) == RETAIN
        assert sorted(i for pick in kept.picks for i in pick.kept) == list(kept.kept)
        assert len(kept.pivots) == 4
        assert all(kept.positions[i] in {p.position for p in kept.picks} for i in kept.pivots)


def test_nothing_is_added_unasked() -> None:
    model, inputs = Decoder(), prompt(Sizes())
    made: dict[bool, list[torch.fx.GraphModule]] = {False: [], True: []}
    for tokens in made:
        with lowering_with(lambda c, m, i, t=tokens: (made[t].append(m), lower(c, m, i))[1]):
            run(model, inputs, retain_tokens=RETAIN, tokens=tokens)
        torch._dynamo.reset()
        if not tokens:
            with pytest.raises(DartfxError, match=r"compile with the option tokens=True"):
                dartfx.kept_tokens()
    (plain,), (telling,) = made.values()
    assert "picked_by" not in plain.code
    added = [n.target for n in telling.graph.nodes][len(plain.graph.nodes) :]
    assert len(telling.graph.nodes) == len(plain.graph.nodes) + 1, added
    returned = [next(iter(m.graph.find_nodes(op="output"))).args[0] for m in (plain, telling)]
    assert len(returned[1]) == len(returned[0]) + 3


def test_each_call_replaces_the_last() -> None:
    model = Decoder()
    call = compiled(model, retain_tokens=RETAIN, tokens=True)
    kept = []
    for _ in range(3):
        inputs = prompt(Sizes())
        wanted = by_hand(model, inputs)[1][0].tolist()
        with torch.no_grad():
            call(**inputs)
        kept.append([p + START for p in dartfx.kept_tokens()[0].kept])
        assert kept[-1] == [p for p in wanted if START <= p < START + VISION]
    assert kept[0] != kept[1] or kept[1] != kept[2]
    dartfx.reset()
    with pytest.raises(DartfxError):
        dartfx.kept_tokens()


def test_across_a_graph_break() -> None:
    model, inputs = Halves(), prompt(Sizes())
    wanted, keep_idx = by_hand(model, inputs)
    options = {"lowering": "eager", "retain_tokens": RETAIN, "tokens": True}
    with torch.no_grad():
        assert_same(torch.compile(model, backend="dart", options=options)(**inputs), wanted)
    (kept,) = dartfx.kept_tokens()
    assert [p + START for p in kept.kept] == [
        p for p in keep_idx[0].tolist() if START <= p < START + VISION
    ]


def test_other_selectors_have_no_pivots() -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=RETAIN, tokens=True, selector="uniform")
    (kept,) = dartfx.kept_tokens()
    assert len(kept.kept) == RETAIN
    assert kept.picks == kept.pivots == ()


def test_images_by_runs_and_by_layouts() -> None:
    inputs = prompt(Sizes())
    ids = inputs["ids"]
    # Two runs: five tokens, a word, the other seven.
    ids[0, 2 : 2 + VISION + 1] = torch.tensor([1] * 5 + [3] + [1] * 7)
    run(Decoder(), inputs, retain_tokens=RETAIN, tokens=True)
    assert [len(k.positions) for k in dartfx.kept_tokens()] == [5, 7]
    assert dartfx.kept_tokens()[1].positions == tuple(range(8, 15))
    # One image of three tiles may be broken by text; its layout says so.
    whole = dartfx.kept_tokens([(3, 4)])
    assert [len(k.positions) for k in whole] == [12]
    assert sum(len(k.kept) for k in dartfx.kept_tokens()) == len(whole[0].kept) == RETAIN
    assert [(c.row, c.column) for c in whole[0].cells() if c] == [
        divmod(i, 4) for i in whole[0].kept
    ]
    pair = dartfx.kept_tokens([(2, 3), (2, 3)])
    assert [(k.image, len(k.positions)) for k in pair] == [(0, 6), (1, 6)]
    with pytest.raises(ValueError, match="layouts have 9 tokens, but the prompt 12 vision tokens"):
        dartfx.kept_tokens([(3, 3)])
    with pytest.raises(
        ValueError, match=r"how 5 vision tokens lie .* not known; .*grid \(rows, columns\)"
    ):
        dartfx.kept_tokens()[0].cells()
    with pytest.raises(ValueError, match="the layout has 6 tokens, but the image 5"):
        dartfx.kept_tokens()[0].cells((2, 3))


def test_layouts() -> None:
    assert Layout.grid(2, 3).cells[4] == Cell(0, 1, 1)
    video = Layout.grid(4, 2, 3)
    assert (len(video.cells), len(video.views), video.cells[13]) == (24, 4, Cell(2, 0, 1))
    tiled = Layout.tiles(1, 2, (2, 2))
    assert tiled.views == ((2, 4), (2, 2))
    # The second tile's first token is in the upper row, to the right of the first tile.
    assert tiled.cells[4:9] == (
        Cell(0, 0, 2), Cell(0, 0, 3), Cell(0, 1, 2), Cell(0, 1, 3), Cell(1, 0, 0),
    )  # fmt: skip
    first = Layout.tiles(1, 2, (2, 2), overview="first")
    assert (first.views, first.cells[3], first.cells[4]) == (
        ((2, 2), (2, 4)), Cell(0, 1, 1), Cell(1, 0, 0),
    )  # fmt: skip
    for layout, tiles in ((tiled, [0] * 4 + [1] * 4), (first, [None] * 4 + [0] * 4)):
        cells = [cell for cell in layout.cells if cell is not None]
        assert [layout.tiling.of(cell) for cell in cells][:8] == tiles
    assert len(Layout.tiles(2, 2, (3, 3), overview=None).cells) == 36
    anyres = Layout.anyres((2, 2), (2, 3))
    assert anyres.cells[4:8] == (Cell(1, 0, 0), Cell(1, 0, 1), Cell(1, 0, 2), None)
    assert len(anyres.cells) == 4 + 2 * 4
    assert merged((1, 8, 12), 24) == Layout.grid(1, 4, 6)
    assert merged((3, 4, 4), 48) == Layout.grid(3, 4, 4)
    with pytest.raises(
        ValueError, match=r"25 tokens do not come from a patch grid of \(1, 8, 12\)"
    ):
        merged((1, 8, 12), 25)
    with pytest.raises(ValueError, match=r"a grid is \(rows, columns\)"):
        Layout.grid(4)
    with pytest.raises(ValueError, match="overview is"):
        Layout.tiles(1, 1, (2, 2), overview="middle")


def test_explain_shows_tokens_on_request() -> None:
    llava = load("llava", layers=3)
    inputs = llava.make_inputs("two")
    explained = dartfx.explain(llava.model, **inputs, options={"retain_tokens": 6}, tokens=True)
    assert [len(k.positions) for k in explained.tokens] == [16, 16]
    assert sum(len(k.kept) for k in explained.tokens) == 6
    assert "row 0, image 1: " in str(explained)
    assert "pivot at" in str(explained)


def test_the_option_is_part_of_the_fingerprint() -> None:
    prints = {dartfx.DartConfig(tokens=tokens).fingerprint() for tokens in (False, True)}
    assert len(prints) == 2
    with pytest.raises(ConfigError, match="tokens must be True or False, got 1"):
        dartfx.DartConfig(tokens=1)  # type: ignore[arg-type]


def test_pivots_of_a_decoder_with_one_rotary_table() -> None:
    """Text pivots, and tokens of another image's pivot, have no index in the image."""
    inputs = prompt(Sizes())
    run(Decoder(style=Style(rope="one_row")), inputs, retain_tokens=10, tokens=True)
    (kept,) = dartfx.kept_tokens()
    text = [p for p in kept.picks if p.index is None]
    assert text
    assert all(p.position >= START + VISION for p in text)
    assert {len(p.kept) for p in kept.picks if p.index is not None} <= {1, 2}
