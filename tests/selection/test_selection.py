"""The built-in selectors: common properties, and each against float64 loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import dartfx.tools.evaluate.selectors  # noqa: F401  (registers one more)
from dartfx.ops import select_tokens
from dartfx.selection import cover
from dartfx.selection.registry import BUILT_IN, get_selector, optional_inputs
from dartfx.tools.zoo import oracle
from tests.support.selection_cases import draw, ragged

# "changed" compares frames, and none of these cases has any: tests/selection/test_frames.py.
ALL = (*(name for name in BUILT_IN if name != "changed"), "key_norm")
SAME_ALONE = [name for name in ALL if name != "random"]
Array = NDArray[np.float64]


def with_queries(case: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The case with queries of two heads for each of the keys', and attention of a tower."""
    B, H, S, Dh = case["keys"].shape
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, 2 * H, S, Dh, generator=generator)
    tower = torch.rand(B, S, generator=generator).to(case["keys"].dtype)
    return {**case, "queries": queries.to(case["keys"].dtype), "tower_attention": tower}


def vision_kept(case: dict[str, Any], name: str) -> list[list[int]]:
    rows = select_tokens(**case, selector=name).tolist()
    return [[p for p in row if case["vision_mask"][b, p]] for b, row in enumerate(rows)]


def chosen(name: str, case: dict[str, Any], budget: Tensor, pivots: int = 4) -> Tensor:
    """The selector itself, with whatever it asks for."""
    vision, valid = case["vision_mask"], case["valid_mask"]
    position = torch.arange(vision.shape[1])
    last = torch.where(vision, position, -1).amax(1, keepdim=True)
    given = {"queries": case["queries"], "valid_mask": valid, "most": int(budget.max())}
    given["tower_attention"] = case["tower_attention"]
    optional = {n: given[n] for n in optional_inputs(name)}
    return get_selector(name)(
        case["hidden"],
        case["keys"],
        vision,
        valid & ~vision & (position > last),
        budget,
        pivot_image_tokens=pivots,
        pivot_text_tokens=pivots,
        **optional,
    )


@pytest.mark.parametrize("name", ALL)
def test_budgets_are_met_to_the_token_and_inside_the_mask(name: str) -> None:
    """Whatever each row's budget is, without pivots, and where inputs are equal or no numbers."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(25):
        case = with_queries(draw(seed), seed)
        if seed % 5 == 3:
            case["hidden"], case["keys"] = case["hidden"] * 0, case["keys"] * 0
        if seed % 5 == 4:
            case["hidden"][:, ::3], case["keys"][:, :, ::4] = torch.nan, torch.nan
        total = case["vision_mask"].sum(1)
        for pivots in (0, 4):
            budget = (torch.rand(len(total), generator=generator) * (total + 1)).long()
            for wanted in (budget, total, total * 0):
                kept = chosen(name, case, wanted, pivots)
                assert kept.dtype == torch.bool
                assert kept.sum(1).tolist() == wanted.tolist(), (seed, pivots)
                assert not bool((kept & ~case["vision_mask"]).any())


@pytest.mark.parametrize("name", SAME_ALONE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_selects_what_it_selects_alone(name: str, side: str) -> None:
    case = with_queries(ragged([20, 20, 20], [0, 3, 7], words=6, side=side))
    together = vision_kept(case, name)
    for row in range(3):
        where = case["valid_mask"][row]
        alone = {
            "hidden": case["hidden"][row : row + 1, where],
            "keys": case["keys"][row : row + 1, :, where],
            "queries": case["queries"][row : row + 1, :, where],
            "tower_attention": case["tower_attention"][row : row + 1, where],
            "vision_mask": case["vision_mask"][row : row + 1, where],
            "retain": case["retain"],
        }
        first = int(where.int().argmax())
        assert [p - first for p in together[row]] == vision_kept(alone, name)[0]


@pytest.mark.parametrize("name", SAME_ALONE)
def test_rows_of_unequal_vision_tokens_keep_by_the_batch_rule(name: str) -> None:
    case = with_queries(ragged([12, 24, 18], [12, 0, 6], words=6))
    assert [len(kept) for kept in vision_kept(case, name)] == [9, 15, 9]


@pytest.mark.parametrize("name", SAME_ALONE)
def test_sizes_may_be_symbolic(name: str) -> None:
    """One compilation for prompts of several lengths, with what is selected eagerly."""
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return torch._dynamo.backends.debugging.aot_eager(module, inputs)

    def select(
        hidden: Tensor, keys: Tensor, vision: Tensor, queries: Tensor, tower: Tensor, n: int
    ) -> Tensor:
        given = (hidden, keys, vision, None, n, 7, 4, 4, name, "auto", queries)
        selected: Tensor = torch.ops.dartfx.select_tokens(*given, tower_attention=tower)
        return selected

    torch._dynamo.reset()
    compiled = torch.compile(select, backend=backend, dynamic=True, fullgraph=True)
    for count, words in ((20, 6), (31, 5), (24, 9)):
        case = with_queries(ragged([count, count], [0, 0], words))
        names = "hidden", "keys", "vision_mask", "queries", "tower_attention"
        given = (*(case[name] for name in names), count)
        assert torch.equal(compiled(*given), select(*given))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", SAME_ALONE)
def test_equal_tokens_are_kept_by_position(name: str) -> None:
    """Equal tokens: the lowest positions, but where places count: of each stretch the lowest."""
    case = with_queries(ragged([12], [0], words=4))
    case["hidden"], case["keys"] = torch.ones(1, 16, 16), torch.ones(1, 2, 16, 8)
    alike = {n: case[n] * 0 for n in ("queries", "tower_attention")}
    kept = chosen(name, case | alike, torch.tensor([4]))
    want = {
        "tiled": [0, 3, 6, 9],
        "uniform": [1, 4, 7, 10],
        # The first, then any token at least three away from all kept ones.
        "spread": [0, 3, 6, 9],
    }
    assert kept[0].nonzero()[:, 0].tolist() == want.get(name, [0, 1, 2, 3])


# --- each against the definition in float64 ------------------------------------------------------


def by_attention(
    case: dict[str, Array], row: int, pool: list[int], budget: int
) -> oracle.Selection:
    queries, keys, valid = case["queries"][row], case["keys"][row], case["valid"][row]
    last = max(p for p in range(len(valid)) if valid[p])
    attention = np.zeros(len(valid))
    group = queries.shape[0] // keys.shape[0]
    for head in range(queries.shape[0]):
        places = [p for p in range(len(valid)) if valid[p]]
        scores = [queries[head, last] @ keys[head // group, p] for p in places]
        weights = np.exp(np.array(scores) / np.sqrt(keys.shape[2]))
        attention[places] += weights / weights.sum() / queries.shape[0]
    out = oracle.Selection([])
    out.kept = sorted(oracle.lowest({p: -attention[p] for p in pool}, budget, out.gaps, True))
    return out


def by_stretches(
    case: dict[str, Array], row: int, pool: list[int], budget: int
) -> oracle.Selection:
    hidden, keys, valid = case["hidden"][row], case["keys"][row], case["valid"][row]
    norms, out = oracle.key_norms(keys), oracle.Selection([])
    text = [p for p in range(pool[-1] + 1, len(valid)) if valid[p]]
    many = min(4, budget) if text or budget else 0
    pivots = oracle.lowest({p: -norms[p] for p in pool}, many, out.gaps, True)
    pivots += oracle.lowest({p: -norms[p] for p in text}, 4, out.gaps, True)
    for stretch in range(budget):
        members = [p for i, p in enumerate(pool) if i * budget // len(pool) == stretch]
        likeness = {
            p: max(oracle.cosine(hidden[p], hidden[pivot]) for pivot in pivots) for p in members
        }
        out.kept += oracle.lowest(likeness, 1, out.gaps)
    out.kept.sort()
    return out


def by_distance(case: dict[str, Array], row: int, pool: list[int], budget: int) -> oracle.Selection:
    hidden, norms = case["hidden"][row], oracle.key_norms(case["keys"][row])
    out = oracle.Selection([])
    place = {p: i * budget / len(pool) for i, p in enumerate(pool)}
    score = {p: -norms[p] for p in pool}
    for _ in range(budget):
        [taken] = oracle.lowest(score, 1, out.gaps, relative=not out.kept)
        out.kept.append(taken)
        score = {
            p: -min(
                1 - oracle.cosine(hidden[p], hidden[k]) + min(1.0, abs(place[p] - place[k]))
                for k in out.kept
            )
            for p in pool
            if p not in out.kept
        }
    out.kept.sort()
    return out


def by_coverage(case: dict[str, Array], row: int, pool: list[int], budget: int) -> oracle.Selection:
    """Of each of the equal stretches its share, one token after the other."""
    hidden, out = case["hidden"][row], oracle.Selection([])
    weights = case.get("weights", np.ones(case["valid"].shape))[row]
    longest = int(case.get("longest", np.array(576)))
    parts = max(1, -(-len(pool) // longest))
    for part, share in enumerate(shares(pool, parts, budget)):
        members = [p for i, p in enumerate(pool) if i * parts // len(pool) == part]
        alike = {u: {k: oracle.cosine(hidden[u], hidden[k]) for k in members} for u in members}
        covered, kept = dict.fromkeys(members, 0.0), list[int]()
        for _ in range(share):
            gain = {
                k: sum(weights[u] * max(0.0, alike[u][k] - covered[u]) for u in members)
                for k in members
                if k not in kept
            }
            [taken] = oracle.lowest({k: -g for k, g in gain.items()}, 1, out.gaps, True)
            kept.append(taken)
            covered = {u: max(covered[u], alike[u][taken]) for u in members}
        out.kept += kept
    out.kept.sort()
    return out


def shares(pool: list[int], parts: int, budget: int) -> list[int]:
    """By size, largest remainders first, ties to the earlier."""
    sizes = [sum(i * parts // len(pool) == p for i in range(len(pool))) for p in range(parts)]
    whole = [budget * size // len(pool) for size in sizes]
    order = sorted(range(parts), key=lambda p: (-(budget * sizes[p] % len(pool)), p))
    for part in order[: budget - sum(whole)]:
        whole[part] += 1
    return whole


def by_relevance(
    case: dict[str, Array], row: int, pool: list[int], budget: int
) -> oracle.Selection:
    queries, keys, valid = case["queries"][row], case["keys"][row], case["valid"][row]
    readers = [p for p in range(pool[-1] + 1, len(valid)) if valid[p]][-32:]
    weights, group = np.zeros(len(valid)), queries.shape[0] // keys.shape[0]
    for reader in readers:
        for head in range(queries.shape[0]):
            scores = [queries[head, reader] @ keys[head // group, p] for p in pool]
            shares = np.exp(np.array(scores) / np.sqrt(keys.shape[2]))
            weights[pool] += shares / shares.sum() / (len(readers) * queries.shape[0])
    if not readers:
        weights[pool] = 1
    rows = np.zeros(case["valid"].shape)
    rows[row] = weights
    return by_coverage({**case, "weights": rows}, row, pool, budget)


DEFINITIONS: dict[str, Callable[..., oracle.Selection]] = {
    "fastv": by_attention,
    "tiled": by_stretches,
    "spread": by_distance,
    "cover": by_coverage,
    "relevant": by_relevance,
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_selects_what_its_definition_says(name: str, dtype: torch.dtype) -> None:
    compare_with_definition(name, dtype, 576)


@pytest.mark.parametrize("name", ["cover", "relevant"])
def test_long_rows_are_covered_stretch_by_stretch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cover, "STRETCH", 7)
    compare_with_definition(name, torch.float32, 7)


def compare_with_definition(name: str, dtype: torch.dtype, longest: int) -> None:
    decided = 0
    for seed in range(30):
        case = with_queries(draw(seed, S=60, dtype=dtype), seed)
        numbers = {n: case[n].double().numpy() for n in ("hidden", "keys", "queries")}
        numbers |= {"valid": case["valid_mask"].numpy(), "longest": np.array(longest)}
        total = case["vision_mask"].sum(1)
        budget = torch.minimum(total, torch.tensor(case["retain"]))
        kept = chosen(name, case, budget)
        for row in range(len(total)):
            pool = case["vision_mask"][row].nonzero()[:, 0].tolist()
            want = DEFINITIONS[name](numbers, row, pool, int(budget[row]))
            if min(want.gaps, default=1) < 1e-4:
                continue  # too close for float32 to tell
            decided += 1
            assert kept[row].nonzero()[:, 0].tolist() == want.kept, (seed, row)
    assert decided > 15
