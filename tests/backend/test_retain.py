"""How many vision tokens are kept: the paper's budgets, exact rounding, and symbolic sizes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError


@pytest.mark.parametrize(
    ("ratio", "vision_tokens", "retained"),
    [(0.667, 576, 192), (0.778, 576, 128), (0.889, 576, 64), (0.889, 2880, 320)],
)
def test_the_papers_budgets(ratio: float, vision_tokens: int, retained: int) -> None:
    assert DartConfig(reduction_ratio=ratio).retain_for(vision_tokens) == retained


def test_halves_go_up_and_something_is_always_kept() -> None:
    half = DartConfig(reduction_ratio=0.5)
    assert [half.retain_for(n) for n in (0, 1, 2, 3, 5, 7, 9)] == [1, 1, 1, 2, 3, 4, 5]
    assert DartConfig(reduction_ratio=0.999).retain_for(10) == 1


def test_the_ratio_is_the_decimal_that_was_written() -> None:
    # A tenth of 25, 15 and 35 are halves. In binary, 15 * (1 - 0.9) is below 1.5 and rounds down.
    assert round(15 * (1 - 0.9)) == 1
    assert DartConfig(reduction_ratio=0.9).retain_for(25) == 3
    assert DartConfig(reduction_ratio=0.9).retain_for(15) == 2
    assert DartConfig(reduction_ratio=0.9).retain_for(35) == 4


def test_retain_tokens_wins_and_is_not_clipped() -> None:
    assert [DartConfig(retain_tokens=64).retain_for(n) for n in (576, 10)] == [64, 64]
    assert DartConfig(retain_tokens=0).retain_for(576) == 0


ratios = st.one_of(
    st.floats(min_value=0, max_value=1, exclude_max=True),
    st.integers(0, 999).map(lambda thousandths: thousandths / 1000),
    st.sampled_from([0.5, 0.25, 0.75, 0.125]),
)


@given(ratio=ratios, n=st.integers(0, 1 << 40))
def test_r_is_the_rounded_fraction(ratio: float, n: int) -> None:
    expected = max(1, math.floor(n * (1 - Fraction(str(ratio))) + Fraction(1, 2)))
    retained = DartConfig(reduction_ratio=ratio).retain_for(n)
    assert retained == expected
    assert type(retained) is int


def symbol(shape_env: ShapeEnv, hint: int) -> torch.SymInt:
    source = ConstantSource(f"vision_tokens_{hint}")
    expression = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    number = shape_env.create_symintnode(expression, hint=hint, source=source)
    assert isinstance(number, torch.SymInt)
    return number


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.667, 0.778, 0.889, 0.125, 0.12345678901])
def test_a_symint_gives_the_same_number_and_no_guard(ratio: float) -> None:
    config = DartConfig(reduction_ratio=ratio)
    for n in (3, 4, 5, 12, 20, 28, 575, 576, 577, 2880, 1 << 24):
        shape_env = ShapeEnv()
        number = symbol(shape_env, n)
        retained = config.retain_for(number)
        assert isinstance(retained, torch.SymInt)
        assert shape_env.guards == []
        assert retained.node.hint == config.retain_for(n)


def test_asking_inside_a_backend_does_not_make_it_compile_again() -> None:
    config = DartConfig(reduction_ratio=0.778)
    lengths: list[tuple[int, int]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        (length,) = (x for x in inputs if isinstance(x, torch.SymInt))
        lengths.append((length.node.hint, config.retain_for(length).node.hint))
        return graph.forward

    compiled = torch.compile(torch.sin, backend=backend, dynamic=True, fullgraph=True)
    for n in (9, 2, 576, 2880):
        assert compiled(torch.zeros(n)).shape == (n,)
    assert lengths == [(9, 2)]


def test_a_ratio_too_fine_for_compiled_arithmetic_is_refused_there_only() -> None:
    config = DartConfig(reduction_ratio=1 - 64 / 576)
    assert config.retain_for(576) == 64
    with pytest.raises(ConfigError, match="at most 11 decimals, or give retain_tokens"):
        config.retain_for(symbol(ShapeEnv(), 576))
