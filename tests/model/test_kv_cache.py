"""What is noted on a KV cache of a pruned call, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dartfx.errors import SelectionError
from dartfx.model import kv_cache


def pruned_cache(keep_idx: torch.Tensor, prompt: int) -> SimpleNamespace:
    """A cache of one layer that holds ``keep_idx`` [B, S'] of ``prompt`` tokens."""
    rows, kept = keep_idx.shape
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(rows, 1, kept, 2))])
    kv_cache.mark_pruned(cache, prompt, [keep_idx])
    return cache


def test_decode_mask_has_the_kept_columns() -> None:
    cache = pruned_cache(torch.tensor([[0, 2, 4], [2, 3, 4]]), prompt=5)
    prompt = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    padded = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    for mask, kept in ((prompt, [[1, 1, 1], [1, 1, 1]]), (padded, [[0, 1, 1], [0, 1, 1]])):
        decoding = torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
        expected = [[*row, 1, 1] for row in kept]
        assert kv_cache.gather_decode_mask(cache, decoding).tolist() == expected
        four = kv_cache.gather_decode_mask(cache, decoding[:, None, None].float())
        assert four[:, 0, 0].tolist() == expected


def test_other_rows_than_the_caches_are_refused() -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    with pytest.raises(SelectionError, match=r"mask of 4 rows .* pruned with 2 rows"):
        kv_cache.gather_decode_mask(cache, torch.ones(4, 4, dtype=torch.int64))


def test_a_mask_of_the_prompt_or_none_stays() -> None:
    cache = pruned_cache(torch.tensor([[0, 2], [1, 2]]), prompt=3)
    for mask in (None, torch.ones(2, 3)):
        assert kv_cache.gather_decode_mask(cache, mask) is mask
