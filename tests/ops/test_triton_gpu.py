"""The Triton kernels inside compiled graphs, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.selection_cases import expected, operator, plain, ragged

pytestmark = pytest.mark.gpu


def there(case: dict[str, Any]) -> dict[str, Any]:
    return {k: x.cuda() if isinstance(x, Tensor) else x for k, x in case.items()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_launches_the_kernels(dynamic: bool) -> None:
    function = torch.compile(operator, fullgraph=True, dynamic=dynamic)
    for counts, pads, words, retain in (([30, 20], [0, 3], 9, 12), ([50, 50], [4, 9], 14, 20)):
        case = {**ragged(counts, pads, words), "retain": retain, "N": sum(counts) // 2}
        want = expected(case)
        assert want.gap > 1e-5
        assert function(there(case)).tolist() == want.keep_idx


def test_a_cuda_graph_replays_on_new_inputs() -> None:
    case = {**plain(S=640, first=35, N=576, retain=64), "N": 576}
    device = there(case)
    operator(device)  # compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = operator(device)
    for seed in range(3):
        case["hidden"] = torch.randn(1, 640, 16, generator=torch.Generator().manual_seed(seed))
        device["hidden"].copy_(case["hidden"])
        graph.replay()
        want = expected(case)
        assert want.gap > 1e-7
        assert kept.tolist() == want.keep_idx


def test_triton_and_torch_agree_in_bfloat16() -> None:
    """At full width, where sums are long: all but the closest decisions."""
    torch.manual_seed(0)
    vision = torch.zeros(1, 2930, dtype=torch.bool, device="cuda")
    vision[:, 35:2915] = True
    hidden = torch.randn(1, 2930, 4096, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(1, 32, 2930, 128, device="cuda", dtype=torch.bfloat16)
    case = {"hidden": hidden, "keys": keys, "vision_mask": vision, "retain": 320, "N": 2880}
    fast, slow = (set(operator(case, kernel=k)[0].tolist()) for k in ("triton", "torch"))
    assert len(fast) == len(slow) == 370
    assert len(fast & slow) >= 366
