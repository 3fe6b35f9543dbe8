"""``dartfx.verify`` passes for correct rewrites and detects wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.errors import UnsupportedGraphError
from dartfx.passes.transform import gather_frontier, insert_selection
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import Decoder, Inputs, Sizes, Style, changed, prompt

OPTIONS = {"retain_tokens": 5}


def verified(model: torch.nn.Module, inputs: Inputs, **more: Any) -> dartfx.Verification:
    return dartfx.verify(model, options=OPTIONS, **inputs, **more)


@pytest.mark.parametrize(
    ("attend", "mask"),
    [
        ("sdpa", "none"),  # causal
        ("sdpa", "4d_bool"),
        ("sdpa", "4d_float"),
        ("repeated", "4d_bool"),
        ("softmax", "4d_float"),
        ("filled", "4d_bool"),
        ("where", "4d_bool"),
    ],
)
@pytest.mark.parametrize("pads", [(), pytest.param((0, 3), marks=pytest.mark.slow)])
def test_a_decoder_is_verified(attend: str, mask: str, pads: tuple[int, ...]) -> None:
    z = Sizes(batch=len(pads) or 1, layers=4)
    style = Style(attend=attend, rope="one_row", mask=mask)
    inputs = prompt(z, pads)
    if not mask.startswith("4d"):
        inputs.pop("valid", None)
    found = verified(Decoder(z, style), inputs)
    assert found.ok
    assert found.exact
    assert list(found.layers) == [0, 1, 2, 3]
    assert found.layers[0] == found.layers[1] == 0, "nothing is pruned there"
    assert max(found.layers.values()) < 1e-5
    assert len(found.outputs) == 1 + 2 * z.layers
    assert "layer 2: verified" in str(found)
    assert "equal to the original, bit for bit" in str(found)


def test_masking_is_not_pruning_for_nothing() -> None:
    """The masked graph differs from the original; else the second check would say nothing."""
    model, inputs = Decoder(Sizes(layers=4), Style(mask="4d_bool")), prompt(Sizes(layers=4))
    from dartfx.verification import masked_reference

    seen = []
    attend = masked_reference._attend

    def spy(dropped: Tensor, *more: Any, **options: Any) -> Tensor:
        seen.append(dropped.sum().item())
        return attend(dropped, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_reference, "_attend", spy)
        assert verified(model, inputs).ok
    assert seen == [12 - 5] * 2, "the dropped tokens, in the layers from the cut on"


def broken_by(patch: pytest.MonkeyPatch, name: str) -> None:
    """Break the passes in one place."""
    by_index = gather_frontier.Gatherer._by_index

    def gathers_the_first(self: Any, emit: Any, value: Any, dims: Any) -> Any:
        """Tables are cut off instead of gathered: kept tokens get others' positions."""
        if "cos" not in value.name:
            return by_index(self, emit, value, dims)
        kept = emit.size(self.keep_idx, 1)
        for dim in dims:
            value = emit(torch.ops.aten.slice.Tensor, value, dim, 0, kept)
        return value

    def wrong_by_a_little(emit: Any, *more: Any) -> Any:
        keep, mask = select(emit, *more)
        return insert_selection.Selected(emit(torch.ops.aten.roll.default, keep, [1], [1]), mask)

    select = insert_selection.insert
    replacements: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "positions": (gather_frontier.Gatherer, "_by_index", gathers_the_first),
        "order": (insert_selection, "insert", wrong_by_a_little),
    }
    patch.setattr(*replacements[name])


def test_wrong_positions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(monkeypatch, "positions")
    found = verified(Decoder(style=Style(rope="one_row")), prompt(Sizes()))
    assert found.exact, "with all tokens kept the tables are right"
    assert not found.ok
    assert found.layers[1] == 0
    assert found.layers[2] > 1e-3
    assert "NOT VERIFIED" in str(found)


def test_a_wrong_order_is_noticed_with_all_tokens_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_by(monkeypatch, "order")
    found = verified(Decoder(style=Style(rope="one_row")), prompt(Sizes()))
    assert not found.exact
    assert found.inexact > 1e-3
    assert "all tokens retained: off by" in str(found)


def test_a_tolerance_of_nothing() -> None:
    model, inputs = Decoder(Sizes(layers=4), Style(rope="one_row")), prompt(Sizes())
    found = verified(model, inputs, tolerance=0.0)
    assert found.ok == (max([*found.layers.values(), *found.outputs.values()]) == 0)
    assert found.tolerance == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_whole_models(name: str) -> None:
    """A padded batch with uniform caches; and sliding windows, whose caches are tails."""
    family = load(name, layers=3)
    before = family.model._compiled_call_impl
    inputs = family.make_inputs("pad2" if name == "llava" else "one")
    found = dartfx.verify(
        family.model.generate, **inputs, max_new_tokens=1, do_sample=False,
        options={"retain_tokens": 6},
    )  # fmt: skip
    assert found.ok, str(found)
    assert family.model._compiled_call_impl is before


def test_what_is_not_pruned_cannot_be_verified() -> None:
    refused = Decoder(layer=changed(lambda m, x: x.cumsum(1)))
    with pytest.raises(UnsupportedGraphError, match=r"cumsum.* reads the token axis") as caught:
        verified(refused, prompt(Sizes()))
    assert "test_verify.py" in caught.value.where

    class Text(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    with pytest.raises(UnsupportedGraphError, match="no vision tokens enter a decoder"):
        dartfx.verify(Text(), torch.ones(2))
    with pytest.raises(TypeError, match="needs a model or a method of one"):
        dartfx.verify(len, [1])


def test_several_graphs_are_refused() -> None:
    class Halves(Decoder):
        def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            merged = super().merge(ids, features)
            torch._dynamo.graph_break()
            return merged

    model = Halves()
    with pytest.raises(
        UnsupportedGraphError, match="does not hold this call in one graph"
    ) as caught:
        verified(model, prompt(Sizes()))
    assert "model.generate" in caught.value.advice
    assert model._compiled_call_impl is None
