"""The attention received by the vision tower's tokens, and the ranking by it, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dartfx import select_tokens
from tests.support.tolerances import ATTENTION


@pytest.mark.parametrize("by_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_received_is_what_its_definition_says(
    by_first: bool, dtype: torch.dtype
) -> None:
    images, heads, group, tokens, width, scale = 3, 2, 2, 7, 5, 0.3
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(images, heads * group, tokens, width, generator=generator).to(dtype)
    keys = torch.randn(images, heads, tokens, width, generator=generator).to(dtype)
    got = torch.ops.dartfx.attention_received(queries, keys, scale, by_first)
    q, k = queries.double().numpy(), keys.double().numpy()
    counted, expected = (1 if by_first else tokens), np.zeros((images, tokens))
    for image in range(images):
        for head in range(heads * group):
            for query in range(counted):
                scores = np.exp(k[image, head // group] @ q[image, head, query] * scale)
                expected[image] += scores / scores.sum() / (heads * group * counted)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, **ATTENTION)
    np.testing.assert_allclose(got.sum(1).numpy(), np.ones(images), rtol=ATTENTION["rtol"])
    fake = torch.ops.dartfx.attention_received(queries.to("meta"), keys.to("meta"), scale, by_first)
    assert (fake.shape, fake.dtype) == (got.shape, got.dtype)


@pytest.mark.parametrize("quota", ["joint", "image"])
def test_the_most_attended_tokens_are_kept_ties_to_the_lowest(quota: str) -> None:
    """Two images of 7 and 5 tokens, attention of few distinct values, one that is no number."""
    generator = torch.Generator().manual_seed(0)
    vision = torch.zeros(2, 20, dtype=torch.bool)
    vision[:, 2:9] = vision[:, 11:16] = True
    attention = torch.randint(0, 3, (2, 20), generator=generator).float()
    attention[0, 3] = torch.nan
    case = {"hidden": torch.randn(2, 20, 4), "keys": torch.randn(2, 1, 20, 2)}
    got = select_tokens(
        **case,
        vision_mask=vision,
        retain=6,
        selector="attended",
        tower_attention=attention,
        quota=quota,
    )
    images = [[*range(2, 9)], [*range(11, 16)]]
    pools = [(images[0] + images[1], 6)] if quota == "joint" else [(images[0], 3), (images[1], 3)]
    for row in range(2):
        score = attention[row].nan_to_num(-1).tolist()
        want = set(range(20)) - {p for image in images for p in image}
        for pool, share in pools:
            want |= set(sorted(pool, key=lambda p: (-score[p], p))[:share])
        assert got[row].tolist() == sorted(want)
