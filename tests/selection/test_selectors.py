"""The selector registry, the built-in selectors, and handling of faulty selectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dartfx.errors import ConfigError, SelectionError
from dartfx.ops import select_tokens
from dartfx.selection import registry
from dartfx.selection.batch_rule import enforce_budget
from dartfx.selection.registry import (
    BUILT_IN,
    get_selector,
    optional_inputs,
    register_selector,
    selector_fingerprint,
    selector_names,
)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    yield
    torch._dynamo.reset()


def batch() -> dict[str, Any]:
    """Two rows of 12 and 8 vision tokens, so that N = 10, with text on both sides and pads."""
    generator = torch.Generator().manual_seed(0)
    vision = torch.zeros(2, 24, dtype=torch.bool)
    vision[0, 4:16] = True
    vision[1, 8:16] = True
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, :6] = False
    return {
        "hidden": torch.randn(2, 24, 8, generator=generator),
        "keys": torch.randn(2, 2, 24, 4, generator=generator),
        "vision_mask": vision,
        "valid_mask": valid,
        "retain": 4,
    }


def vision_kept(case: dict[str, Any], keep_idx: Tensor) -> list[list[int]]:
    return [
        [p for p in row if case["vision_mask"][b, p]] for b, row in enumerate(keep_idx.tolist())
    ]


def test_built_in_names() -> None:
    assert (
        *("attended", "changed", "cover", "dart", "fastv", "random"),
        *("relevant", "spread", "tiled", "uniform"),
    ) == BUILT_IN
    assert list(selector_names()) == sorted(selector_names())


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "changed"])
def test_the_operator_keeps_text_whatever_the_selector(name: str) -> None:
    case = batch()
    optional = {"queries": torch.ones(2, 4, 24, 4), "tower_attention": torch.rand(2, 24)}
    got = select_tokens(**case, selector=name, **optional)
    assert got.shape == (2, 18)
    for b in range(2):
        text = torch.nonzero(case["valid_mask"][b] & ~case["vision_mask"][b])[:, 0].tolist()
        assert set(text) <= set(got[b].tolist())
    assert [len(row) for row in vision_kept(case, got)] == [6, 4]


def test_uniform_takes_the_middle_of_equal_bins() -> None:
    case = batch()
    case["vision_mask"][1] = case["vision_mask"][0]
    case["valid_mask"] = None
    for retain, want in ((1, [9]), (2, [6, 12]), (4, [5, 8, 11, 14]), (12, list(range(4, 16)))):
        case["retain"] = retain
        assert vision_kept(case, select_tokens(**case, selector="uniform"))[0] == want, retain


def test_random_follows_manual_seed() -> None:
    case = batch()

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return vision_kept(case, select_tokens(**case, selector="random"))

    assert draw(1) == draw(1)
    assert len({str(draw(seed)) for seed in range(10)}) > 5
    seen = {p for seed in range(60) for p in draw(seed)[0]}
    assert seen == set(range(4, 16))


def test_random_draws_again_in_every_compiled_call() -> None:
    case = batch()

    def call(hidden: Tensor) -> Tensor:
        return torch.ops.dartfx.select_tokens(
            hidden,
            case["keys"],
            case["vision_mask"],
            case["valid_mask"],
            10,
            4,
            4,
            4,
            "random",
            "auto",
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    drawn = [compiled(case["hidden"]) for _ in range(6)]
    assert len({str(keep_idx.tolist()) for keep_idx in drawn}) > 1
    assert all([len(r) for r in vision_kept(case, k)] == [6, 4] for k in drawn)
    torch.manual_seed(3)
    first = compiled(case["hidden"])
    torch.manual_seed(3)
    assert torch.equal(compiled(case["hidden"]), first)


def first_tokens(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> Tensor:
    return vision_mask & (vision_mask.cumsum(1) <= budget[:, None])


def test_a_registered_selector_is_used() -> None:
    assert register_selector("first")(first_tokens) is first_tokens
    assert get_selector("first") is first_tokens
    assert "first" in selector_names()
    case = batch()
    got = select_tokens(**case, selector="first")
    assert vision_kept(case, got) == [[4, 5, 6, 7, 8, 9], [8, 9, 10, 11]]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown selector 'drat'; registered: .*'dart'\?"):
        get_selector("drat")
    with pytest.raises(ConfigError, match=r"unknown selector 'zzz'; registered: .*'uniform'$"):
        selector_fingerprint("zzz")
    with pytest.raises(ConfigError, match=r"did you mean 'uniform'\?"):
        select_tokens(**batch(), selector="unifrom")
    with pytest.raises(ConfigError, match=r"'divprune'; registered: .*farthest point is 'spread'"):
        select_tokens(**batch(), selector="divprune")


def test_bad_registrations_are_refused() -> None:
    with pytest.raises(ConfigError, match="'dart' is already registered"):
        register_selector("dart")(first_tokens)
    with pytest.raises(ConfigError, match=r"non-empty string.*got ''"):
        register_selector("")
    with pytest.raises(ConfigError, match="'short' cannot be called as a selector"):
        register_selector("short")(lambda hidden, keys: keys)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="'object' must be a Python function"):
        register_selector("object")(torch.nn.Identity())  # type: ignore[type-var]
    assert not {"", "short", "object"} & set(selector_names())


def test_the_optional_inputs_of_a_selector_are_read_off_its_signature() -> None:
    assert {name: optional_inputs(name) for name in ("dart", "random", "uniform", "fastv")} == {
        "dart": (),
        "random": (),
        "uniform": (),
        "fastv": ("queries", "valid_mask"),
    }
    register_selector("positional")(lambda h, k, v, t, queries, /, **valid_mask: v)
    assert optional_inputs("positional") == ()
    with pytest.raises(ConfigError, match=r"missing a required argument: 'values'.* any of quer"):
        register_selector("more")(lambda h, k, v, t, b, *, queries, values, **pivots: v)


def test_a_selector_that_requests_queries_must_be_given_them() -> None:
    with pytest.raises(SelectionError, match="queries must be given: selector 'fastv' requests"):
        select_tokens(**batch(), selector="fastv")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 24), r"queries must be \[B, Hq, S, Dh\], got shape \(2, 4, 24\)"),
        ((2, 3, 24, 4), "a multiple of their heads"),
        ((1, 4, 24, 4), r"got shape \(1, 4, 24, 4\) with keys of \(2, 2, 24, 4\)"),
        ((2, 4, 23, 4), "must be"),
        ((2, 4, 24, 8), "must be"),
    ],
)
def test_queries_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select_tokens(**batch(), selector="fastv", queries=torch.zeros(shape))


WRONG = {
    "too_many": lambda vision, budget: vision,
    "too_few": lambda vision, budget: vision & (vision.cumsum(1) < budget[:, None]),
    "none": lambda vision, budget: torch.zeros_like(vision),
    "outside": lambda vision, budget: ~vision,
    "both": lambda vision, budget: torch.ones_like(vision),
}


def register_wrong(name: str) -> None:
    choose = WRONG[name]
    register_selector(name)(lambda h, k, vision, t, budget, /, **pivots: choose(vision, budget))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_count_is_an_error(name: str) -> None:
    register_wrong(name)
    with pytest.raises(SelectionError, match=rf"'{name}' did not keep exactly .* row b = 0"):
        select_tokens(**batch(), selector=name)


def test_a_wrong_count_is_an_error_in_a_compiled_graph() -> None:
    register_wrong("too_few")
    case = batch()

    def call(hidden: Tensor) -> Tensor:
        return torch.ops.dartfx.select_tokens(
            hidden,
            case["keys"],
            case["vision_mask"],
            case["valid_mask"],
            10,
            4,
            4,
            4,
            "too_few",
            "auto",
        )

    with pytest.raises(SelectionError, match="'too_few' did not keep exactly"):
        torch.compile(call, backend="aot_eager")(case["hidden"])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_count_is_repaired_before_indices_are_made(name: str) -> None:
    """On a GPU the error arrives late: until then no index may be out of range or repeated."""
    case, budget = batch(), torch.tensor([6, 4])
    kept = enforce_budget(WRONG[name](case["vision_mask"], budget), case["vision_mask"], budget)
    assert kept.sum(1).tolist() == [6, 4]
    assert not bool((kept & ~case["vision_mask"]).any())


def test_a_right_choice_passes_the_repair_unchanged() -> None:
    case, budget = batch(), torch.tensor([3, 4])
    right = torch.zeros(2, 24, dtype=torch.bool)
    right[0, [5, 9, 15]] = True
    right[1, [8, 9, 14, 15]] = True
    assert torch.equal(enforce_budget(right, case["vision_mask"], budget), right)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda vision: vision.float(), r"returned torch.float32 of shape \(2, 24\)"),
        (lambda vision: vision[:, :5], r"returned torch.bool of shape \(2, 5\)"),
    ],
)
def test_a_wrong_result_is_an_error(result: Any, message: str) -> None:
    register_selector("wrong")(lambda h, k, vision, t, budget, /, **pivots: result(vision))
    with pytest.raises(SelectionError, match=message):
        select_tokens(**batch(), selector="wrong")
