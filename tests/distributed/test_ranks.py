"""Tensor parallelism: 2 and 4 processes under torchrun select and answer as one process does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dartfx
from dartfx.observe.compare import compare
from dartfx.observe.html.index import index
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.processes.ranks_worker import NEW_TOKENS, Result
from tests.support.tolerances import CLOSE, RETAIN

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate", reason="transformers needs it to load a tensor-parallel model")
from tests.support.processes.ranks import (  # noqa: E402
    Part,
    case,
    check_forwarded,
    check_generated,
    prompt,
    run,
    unpruned,
)

EAGER = {"lowering": "eager", "on_unsupported": "error"}

# A forward of one row is what test_two_ranks.py tries.
SAME = [case("generate"), case("generate", "pad2"), case("forward", "pad2")]
BY_HEADS = {"selector": "by_heads"}
# The first token says which tokens a prefill kept: more steps compile a decode graph as well.
IN_TWO = [
    *SAME,
    case(
        "generate", name="checked with tokens", check_ranks=True, tokens=True, steps=1, dump="agree"
    ),
    case("generate", name="inductor", lowering="inductor", check_ranks=True),
    case("generate", "pad2", "by heads", steps=1, **BY_HEADS),
    case("other_prompt_on_rank_1", name="other prompt", check_ranks=True),
    case("own_seed", name="one seed", differ=False, selector="random", steps=1),
    case("own_seed", name="own seeds", differ=True, selector="random"),
    case("in_several_graphs"),
    case("with_gradients"),
    case("one_rank_fails", name="fails on 0", rank=0),
    case("one_rank_fails", "pad2", name="fails on 1", rank=1, steps=1),
    case(
        "one_rank_cannot_trace_local_tensors",
        name="local trace fails on 1",
        rank=1,
        steps=1,
        dump="fails",
    ),
    case("one_rank_fails_in_several_graphs", rank=1),
    case("one_rank_does_not_return_the_mask", rank=1),
    {"name": "no answer", "do": "no_answer"},  # rank 0 waits for what rank 1 never says
]


@pytest.fixture(scope="module")
def llava() -> Family:
    return load("llava", layers=3)


@pytest.fixture(scope="module")
def one_head() -> Family:
    """Multi-query attention."""
    return load("llava", layers=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def qwen() -> Family:
    """Biased key projections, and positions in three dimensions."""
    return load("qwen2_5_vl", layers=3, num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks write."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(llava: Family, one_head: Family, folder: Path) -> Callable[[str], list[Result]]:
    """What two ranks found, by case."""
    layer = "model.language_model.layers.*.self_attn"
    whole = {f"{layer}.{name}_proj": "replicate" for name in "kv"}
    # First: the last case of IN_TWO leaves the ranks out of step.
    parts = Part(one_head, [case("generate", name="one head")], whole), Part(llava, IN_TWO)
    found = run(folder, 2, *parts)
    return lambda name: [rank[name] for rank in found]


@pytest.fixture(scope="module")
def four(
    llava: Family, qwen: Family, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Result]]:
    """What four ranks found, by case."""
    plain = case("generate", name="two heads", plain=True, steps=1)
    parts = Part(qwen, SAME), Part(llava, [plain])
    found = run(tmp_path_factory.mktemp("four"), 4, *parts)
    return lambda name: [rank[name] for rank in found]


@pytest.mark.parametrize("variant", ["one", "pad2"])
def test_two_ranks_generate_what_one_process_does(
    llava: Family, two: Callable[[str], list[Result]], variant: str
) -> None:
    check_generated(llava, variant, two(f"generate {variant}"))
    assert [r["how"] for r in two(f"generate {variant}")] == [["key norms summed"]] * 2


def test_two_ranks_forward_a_padded_pair_as_one_process_does(
    llava: Family, two: Callable[[str], list[Result]]
) -> None:
    check_forwarded(llava, "pad2", two("forward pad2"))


@pytest.mark.parametrize(("name", "steps"), [("checked with tokens", 1), ("inductor", NEW_TOKENS)])
def test_options_leave_the_result_alone(
    llava: Family, two: Callable[[str], list[Result]], name: str, steps: int
) -> None:
    check_generated(llava, "one", two(name), steps=steps)


def test_a_selector_of_ones_own_sees_the_heads_of_all_ranks(
    llava: Family, two: Callable[[str], list[Result]]
) -> None:
    inputs = prompt(llava, "pad2")
    model = dartfx.compile(copy.deepcopy(llava.model), retain_tokens=RETAIN, **BY_HEADS, **EAGER)
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
    one = model.generate(**inputs, **settings, return_dict_in_generate=True)
    for result in two("by heads"):
        assert result["how"] == ["heads gathered"]
        assert result["tokens"].tolist() == one.sequences[:, -1:].tolist()
        torch.testing.assert_close(result["logits"], torch.stack(one.logits, 1), **CLOSE)
    # Local heads alone would have kept other tokens.
    first = two("generate pad2")[0]["logits"][:, :1]
    assert not torch.allclose(two("by heads")[0]["logits"], first)


@pytest.mark.parametrize("name", ["other prompt", "own seeds"])
def test_ranks_that_select_differently_raise(two: Callable[[str], list[Result]], name: str) -> None:
    for result in two(name):
        assert result["error"].startswith("SelectionError: rank 1 of process group")
        assert "selected other tokens than rank 0" in result["error"]


def test_random_selection_needs_one_seed_only(two: Callable[[str], list[Result]]) -> None:
    first, second = two("one seed")
    assert first["kinds"] == second["kinds"] == ["Pruned"]
    assert torch.equal(first["logits"], second["logits"])


def test_a_call_in_several_graphs_is_pruned_alike(
    llava: Family, two: Callable[[str], list[Result]]
) -> None:
    oracle = hooked.pruned_forward(llava.model, prompt(llava, "one"), retain=RETAIN)
    for result in two("in_several_graphs one"):
        assert result["kinds"] == ["ReturnsMask", "Pruned"]
        torch.testing.assert_close(result["logits"], oracle.logits, **CLOSE)


def test_gradients_are_refused(llava: Family, two: Callable[[str], list[Result]]) -> None:
    for result in two("with_gradients one"):
        assert "Pruned" not in result["kinds"]
        message = "a tensor-parallel graph that computes gradients"
        assert any(message in because for because in result["because"])
        torch.testing.assert_close(result["logits"], unpruned(llava), **CLOSE)


@pytest.mark.parametrize(
    ("name", "failed", "variant"),
    [("fails on 0", 0, "one"), ("fails on 1", 1, "pad2"), ("local trace fails on 1", 1, "one")],
)
def test_a_failure_on_one_rank_declines_on_all(
    llava: Family, two: Callable[[str], list[Result]], name: str, failed: int, variant: str
) -> None:
    inputs = prompt(llava, variant)
    steps = two(name)[0]["logits"].shape[1]
    plain = hooked.unpruned_generate(llava.model, inputs, max_new_tokens=steps)
    for rank, result in enumerate(two(name)):
        assert result["kinds"] == ["Declined"]
        named = f"rank {failed} of 2 cannot prune its part" in result["because"][0]
        assert named == (rank != failed)
        assert "RuntimeError: injected" in result["because"][0]
        torch.testing.assert_close(result["logits"], plain.logits, **CLOSE)


@pytest.mark.parametrize(
    "name", ["one_rank_fails_in_several_graphs", "one_rank_does_not_return_the_mask"]
)
def test_a_failure_in_one_of_several_graphs_leaves_nobody_waiting(
    llava: Family, two: Callable[[str], list[Result]], name: str
) -> None:
    for result in two(f"{name} one"):
        assert "Pruned" not in result["kinds"]
        assert "Declined" in result["kinds"]
        torch.testing.assert_close(result["logits"], unpruned(llava), **CLOSE)


def test_a_rank_that_does_not_answer_is_named(two: Callable[[str], list[Result]]) -> None:
    waiting, silent = two("no answer")
    assert "rank 0 waited 2 s for ranks [1] of process group" in waiting["error"]
    assert "error" not in silent


def test_four_ranks_with_one_key_head_each(
    qwen: Family, four: Callable[[str], list[Result]]
) -> None:
    for variant in ("one", "pad2"):
        check_generated(qwen, variant, four(f"generate {variant}"))
    check_forwarded(qwen, "pad2", four("forward pad2"))


def test_one_key_head_on_every_rank(one_head: Family, two: Callable[[str], list[Result]]) -> None:
    """Keys that all ranks hold: a plan may leave the one head of multi-query attention whole."""
    results = two("one head")
    check_generated(one_head, "one", results, shared=2)
    assert [r["how"] for r in results] == [["keys are the same on every rank"]] * 2


def test_transformers_cannot_split_key_heads_over_more_ranks(
    four: Callable[[str], list[Result]],
) -> None:
    """What its plan does with two key heads on four ranks; the day it works, test that instead."""
    for rank in four("two heads"):
        assert "is invalid for input of size" in rank["error"]


def test_the_dumps_of_two_ranks_stand_on_one_page(
    two: Callable[[str], list[Result]], folder: Path
) -> None:
    two("checked with tokens")
    page = index(folder / "agree")
    assert page.count('data-differs="0"') == page.count("data-differs=")
    assert page.count("digest <span") == 2
    assert compare(folder / "agree" / "rank_0", folder / "agree" / "rank_1").equal


def test_the_rank_that_could_not_prune_is_marked(
    two: Callable[[str], list[Result]], folder: Path
) -> None:
    two("local trace fails on 1")
    page = index(folder / "fails")
    assert page.count("<b>first difference:</b> rank 0 -&gt; 1: reason: rank 1 of 2 cannot") == 1
    assert re.search(r"collective \d+ \(of \d+ and \d+\)", page)
