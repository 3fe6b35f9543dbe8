"""What the evaluation computes once for several numbers of tokens and selectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dartfx.ops import select_tokens
from dartfx.selection.registry import optional_inputs
from dartfx.tools.evaluate import switch
from dartfx.tools.evaluate.answers import encode_once
from dartfx.tools.evaluate.resume import Resumed


def test_one_selector_replaces_others_that_are_requested() -> None:
    torch.manual_seed(0)
    vision = torch.zeros(1, 20, dtype=torch.bool)
    vision[:, 4:16] = True
    case = {
        "hidden": torch.randn(1, 20, 8),
        "keys": torch.randn(1, 2, 20, 4),
        "queries": torch.randn(1, 4, 20, 4),
        "vision_mask": vision,
        "retain": 5,
    }
    for names in (("dart", "spread"), ("fastv", "tiled")):
        standing = switch.name_for(names)
        for name in names:
            with switch.selecting(name):
                kept = select_tokens(**case, selector=standing)
            assert torch.equal(kept, select_tokens(**case, selector=name))
    assert "queries" not in optional_inputs(switch.name_for(("dart", "spread")))
    seen = {k: v for k, v in case.items() if k != "queries"}
    seen["tower_attention"] = torch.rand(1, 20) * vision
    with switch.selecting("attended"):
        kept = select_tokens(**seen, selector=switch.name_for(["attended"]))
    assert torch.equal(kept, select_tokens(**seen, selector="attended"))


def halves(write: bool = False, retain: int = 2) -> torch.fx.GraphModule:
    """x and masks to what is left of x: traced, with the selection in the middle."""

    def pruned(x: torch.Tensor, keys: torch.Tensor, vision: torch.Tensor) -> tuple[Any, ...]:
        early = torch.nn.functional.gelu(x)
        given = (early, keys, vision, None, 4, retain, 4, 4, "uniform", "auto")
        keep = torch.ops.dartfx.select_tokens(*given)
        late = x.gather(1, keep[:, :, None].expand(-1, -1, 3)) + keep.shape[1]
        if write:
            late = late + early.sum()
            early.add_(keep.sum())
        return early, late

    example = (torch.zeros(1, 6, 3), torch.zeros(1, 1, 6, 2), torch.ones(1, 6, dtype=torch.bool))
    return make_fx(pruned, tracing_mode="symbolic")(*example)


def test_what_comes_before_the_selection_is_computed_once_for_each_input() -> None:
    whole, vision = halves(), torch.tensor([[False, True, True, True, True, False]])
    resumed, counted = Resumed(whole), []
    first = resumed._first.forward
    resumed._first.forward = lambda *given: counted.append(1) or first(*given)  # type: ignore[func-returns-value]
    for value, times in ((1.0, 1), (1.0, 1), (2.0, 2)):
        inputs = (torch.full((1, 6, 3), value), torch.zeros(1, 1, 6, 2), vision)
        for one, other in zip(resumed(*inputs), whole(*inputs), strict=True):
            assert torch.equal(one, other)
        assert len(counted) == times


def test_another_number_of_tokens_needs_no_other_graph() -> None:
    vision = torch.tensor([[False, True, True, True, True, False]])
    inputs = (torch.arange(18.0).view(1, 6, 3), torch.zeros(1, 1, 6, 2), vision)
    resumed = Resumed(halves())
    for retain in (2, 3, 1):
        resumed.retain(retain)
        for one, other in zip(resumed(*inputs), halves(retain=retain)(*inputs), strict=True):
            assert torch.equal(one, other)


def test_inputs_written_to_are_those_of_each_call() -> None:
    """As the states of convolutions in a cache, in front of the cut and behind it."""

    def pruned(x: torch.Tensor, keys: torch.Tensor, vision: torch.Tensor, *states: torch.Tensor):
        early = torch.nn.functional.gelu(x)
        states[0].copy_(early[:, -1])
        own = torch.zeros_like(early[:, -1])
        keep = torch.ops.dartfx.select_tokens(
            early, keys, vision, None, 4, 2, 4, 4, "uniform", "auto"
        )
        late = x.gather(1, keep[:, :, None].expand(-1, -1, 3))
        states[1].copy_(late[:, 1])
        return late + early.sum(), own.copy_(late[:, 1]), early[:, 0]

    def fresh() -> tuple[torch.Tensor, ...]:
        vision = torch.tensor([[False, True, True, True, True, False]])
        x = torch.arange(18.0).view(1, 6, 3)
        return x, torch.zeros(1, 1, 6, 2), vision, torch.zeros(1, 3), torch.zeros(1, 3)

    whole = make_fx(pruned, tracing_mode="symbolic")(*fresh())
    resumed = Resumed(whole)
    wanted = fresh()
    result = whole(*wanted)
    for _ in range(2):
        inputs = fresh()
        made = resumed(*inputs)
        for one, other in zip((*made, *inputs), (*result, *wanted), strict=True):
            assert torch.equal(one, other)
        for value in made:
            value.add_(1)  # as decode does to states
    assert wanted[3].any()
    assert wanted[4].any()


def test_a_graph_that_writes_to_what_is_remembered_is_not_halved() -> None:
    with pytest.raises(ValueError, match="written to behind the selection"):
        Resumed(halves(write=True))


def test_pixels_are_encoded_once() -> None:
    class Base(torch.nn.Module):
        calls = 0

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return pixel_values * 2

    base, pixels = Base(), torch.ones(2)
    encode_once(base)
    for given, calls in ((pixels, 1), (pixels, 1), (torch.ones(2), 2)):
        assert base.get_image_features(pixel_values=given).tolist() == [2, 2]
        assert base.calls == calls
    encode_once(torch.nn.Linear(2, 2))  # has nothing to encode
