"""Counted FLOPs against torch's own counter, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dartfx.passes.analysis.cost import bytes_of, flops

Function = Callable[..., Tensor]

CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((2, 5, 8), (12, 8))),
    "linear with bias": (F.linear, ((5, 8), (12, 8), (12,))),
    "mm": (torch.mm, ((5, 8), (8, 12))),
    "matmul of matrices": (torch.matmul, ((5, 8), (8, 12))),
    "matmul of batches": (torch.matmul, ((2, 3, 5, 8), (2, 3, 8, 7))),
    "matmul with one matrix": (torch.matmul, ((2, 5, 8), (8, 7))),
    "matmul that broadcasts": (torch.matmul, ((2, 1, 5, 8), (3, 8, 7))),
    "bmm": (torch.bmm, ((4, 5, 8), (4, 8, 7))),
    "addmm": (torch.addmm, ((7,), (5, 8), (8, 7))),
    "baddbmm": (torch.baddbmm, ((4, 5, 7), (4, 5, 8), (4, 8, 7))),
    "sdpa": (F.scaled_dot_product_attention, ((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4))),
    "causal sdpa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)),
    ),
    "grouped sdpa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)),
    ),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), ((2, 3, 9, 7), (5, 3, 3, 3))),
    "strided conv2d": (lambda x, w: F.conv2d(x, w, stride=2), ((1, 4, 8, 8), (6, 4, 2, 2))),
    "grouped conv2d": (lambda x, w: F.conv2d(x, w, groups=2), ((1, 4, 6, 6), (6, 2, 3, 3))),
    "conv1d": (F.conv1d, ((2, 3, 9), (5, 3, 4))),
    "memory traffic": (lambda x: (x * 2 + x.sum(0)).softmax(-1), ((4, 6),)),
}


@pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=CASES)
def test_flops_are_those_of_torch(function: Function, shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [torch.randn(s) for s in shapes]
    # The math backend is the one whose parts torch counts on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs).graph
    assert flops(graph.nodes) == counter.get_total_flops()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes(dtype: torch.dtype, width: int) -> None:
    graph = make_fx(lambda x: x + 1, tracing_mode="fake")(torch.zeros(2, 3, 5, dtype=dtype)).graph
    added = [n for n in graph.nodes if n.op == "call_function"]
    assert bytes_of(added) == 2 * 3 * 5 * width
