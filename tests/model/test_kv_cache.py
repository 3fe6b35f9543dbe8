"""What the KV cache of a pruned call knows, without a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dartfx.errors import SelectionError
from dartfx.model import kv_cache


def pruned_cache(keep_idx: torch.Tensor, prompt: int) -> Any:
    """A cache of one layer that holds ``keep_idx`` [B, S'] of ``prompt`` tokens."""
    cache = DynamicCache()
    keys = torch.zeros(keep_idx.shape[0], 1, keep_idx.shape[1], 2)
    cache.update(keys, keys, 0)
    kv_cache.mark_pruned(cache, prompt, [keep_idx])
    return cache


def test_it_states_what_it_saw_and_what_it_holds() -> None:
    cache = pruned_cache(torch.tensor([[0, 2, 4], [2, 3, 4]]), prompt=5)
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(4, 0) == (3 + 4, 2)
    assert kv_cache.pruned_length(cache) == 2
    cache.reset()
    assert (cache.get_seq_length(), kv_cache.pruned_length(cache)) == (0, 0)


def test_masks_get_the_kept_columns_last() -> None:
    cache = pruned_cache(torch.tensor([[0, 2, 4], [2, 3, 4]]), prompt=5)
    prompt = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    padded = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    for mask, kept in ((prompt, [[1, 1, 1], [1, 1, 1]]), (padded, [[0, 1, 1], [0, 1, 1]])):
        whole = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
        expected = [[*row, 1, 1] for row in kept]
        fitted = kv_cache.fit_mask(cache, whole, 2)
        assert fitted[:, 2:].tolist() == expected
        assert not fitted[:, :2].any()
        four = kv_cache.fit_mask(cache, whole[:, None, None].float(), 2)
        assert four[:, 0, 0].tolist() == expected
        assert torch.equal(kv_cache.fit_mask(cache, fitted[:, 2:], 2), fitted)


def test_other_rows_than_the_caches_are_refused() -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    with pytest.raises(SelectionError, match=r"mask of 4 rows .* pruned with 2 rows"):
        kv_cache.fit_mask(cache, torch.ones(4, 4, dtype=torch.int64), 1)


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_a_mask_of_another_length_is_refused(columns: int) -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    with pytest.raises(SelectionError, match="holds 2 of 3 tokens; give one of 4 columns"):
        kv_cache.fit_mask(cache, torch.ones(2, columns, dtype=torch.int64), 1)


def test_a_cache_of_an_earlier_or_another_call_stays() -> None:
    cache = DynamicCache()
    keys = torch.zeros(1, 1, 9, 2)
    cache.update(keys, keys, 0)
    for kept, prompt in (([[0, 2]], 3), ([[0, 2]], 12)):
        kv_cache.mark_pruned(cache, prompt, [torch.tensor(kept)])
        assert kv_cache.pruned_length(cache) == 0
