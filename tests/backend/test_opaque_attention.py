"""Attention in an operator that is opaque to the passes, registered through transformers' API."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import ONE_GRAPH, Declined
from dartfx.runtime.graph_breaks import GraphBreak, broken_by, with_graph_break
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import RETAIN

NAME = "opaque_attention"  # transformers looks for kernels of any name with "flash" in it


@torch.library.custom_op("dartfx_test::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """[B, S, H, D], as flash attention takes them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return torch.empty_like(q)


def without_pads(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """Removes pads first, as flash attention's interface does: how many there are is data."""
    parts = [x.transpose(1, 2) for x in (q, k, v)]
    causal = bool(module.is_causal) and q.shape[2] > 1
    if mask is None:
        return attention(*parts, scaling, causal), None
    (rows,) = torch.nonzero(mask.flatten(), as_tuple=True)
    parts = [x.flatten(0, 1)[rows][None] for x in parts]
    out = torch.zeros_like(q.transpose(1, 2)).flatten(0, 1)
    return out.index_copy(0, rows, attention(*parts, scaling, causal)[0])[None], None


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AttentionInterface.register(NAME, without_pads)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield
    del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]


@pytest.fixture(scope="module")
def built() -> Family:
    return load("llava", layers=3)


def outcomes(built: Family, attention: Any, variant: str = "one") -> tuple[list[Any], Tensor]:
    """What became of the prefill's graphs, and the tokens."""
    model = copy.deepcopy(built.model)
    model.set_attn_implementation(attention)
    options = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "ignore"}
    dartfx.compile(model, **options)
    tokens = model.generate(**built.make_inputs(variant), max_new_tokens=1, do_sample=False)
    made = [report.outcome for report in dartfx.reports(model)]
    return [outcome for outcome in made if isinstance(outcome, Pruned | Declined)], tokens


def test_in_the_decoder_it_is_named(built: Family) -> None:
    [declined], _ = outcomes(built, NAME)
    assert "dartfx_test.attention.default is opaque to the passes" in declined.because
    assert 'attn_implementation="sdpa"' in declined.advice


def test_in_the_tower_it_may_stay(built: Family) -> None:
    recipe = {"text_config": "sdpa", "vision_config": NAME}
    (pruned,), tokens = outcomes(built, recipe)
    (expected,), same = outcomes(built, "sdpa")
    assert isinstance(pruned, Pruned)
    assert pruned.cuts == expected.cuts
    assert torch.equal(tokens, same)


@pytest.mark.slow
def test_unpadding_is_refused(built: Family) -> None:
    found, _ = outcomes(built, NAME, "pad4")
    assert found
    assert not any(isinstance(outcome, Pruned) for outcome in found)
    assert any('attn_implementation="sdpa"' in declined.advice for declined in found)


def test_flash_attention_that_breaks_the_graph_is_named() -> None:
    where = 'File "transformers/modeling_flash_attention_utils.py", line 9, in _is_packed_sequence'
    with broken_by(GraphBreak("it reads data", where)):
        declined = with_graph_break(Declined("no whole decoder stack", advice=ONE_GRAPH))
    assert "it reads data" in declined.because
    assert 'attn_implementation="sdpa"' in declined.advice
