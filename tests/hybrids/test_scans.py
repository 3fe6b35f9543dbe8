"""The gated delta rule as one operator: its values, its gradients, and behind a cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from dartfx.backend.graph_compiler import prepare_dynamo
from dartfx.passes.outcome import OrderMixing, Pruned
from tests.support.decoders import (
    Decoder,
    Layer,
    Sizes,
    assert_same,
    changed,
    prompt,
    pruned_by_hand,
    run,
)
from tests.support.refusals import assert_declined

LONG = Sizes(layers=2, batch=2, seq=150, vision=110)  # three chunks of 64; one when pruned
RETAIN = 9
PATH = f"{qwen.__name__}:torch_chunk_gated_delta_rule"


def operands(length: int, rows: int = 2) -> list[Tensor]:
    """query, key [B, S, 2, 4]; value [B, S, 4, 3]; g and beta [B, S, 4]."""
    query, key = torch.randn(2, rows, length, 2, 4)
    value = torch.randn(rows, length, 4, 3)
    g, beta = -torch.rand(rows, length, 4), torch.rand(rows, length, 4)
    return [query, key, value, g, beta]


def through_the_operator(*given: Tensor | None) -> Any:
    return torch.ops.dartfx.chunk_gated_delta_rule(*given, 64, True, PATH)


def plain(*given: Tensor | None) -> Any:
    *inputs, state = given
    return qwen.torch_chunk_gated_delta_rule(
        *inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def test_the_operator_is_registered_right() -> None:
    given = [x.requires_grad_() for x in operands(70)]
    torch.library.opcheck(
        torch.ops.dartfx.chunk_gated_delta_rule.default,
        (*given, None, 64, True, PATH),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_values_and_gradients_are_those_of_the_function() -> None:
    state = torch.randn(2, 4, 4, 3)
    found = []
    for function in (plain, through_the_operator):
        torch.manual_seed(1)
        given = [x.requires_grad_() for x in (*operands(70), state.clone())]
        given[3] = given[3].detach()  # one that needs no gradient
        outputs, last = function(*given)
        (outputs.square().sum() + last.sum()).backward()
        found.append((outputs, last, *(x.grad for x in given if x.requires_grad)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def scan(layer: Layer, x: Tensor) -> Tensor:
    heads, few = x.unflatten(-1, (2, -1)), x[..., :2]
    outputs, _ = qwen.torch_chunk_gated_delta_rule(
        heads,
        heads,
        heads,
        g=-F.softplus(few),
        beta=few.sigmoid(),
        use_qk_l2norm_in_kernel=True,
    )
    # Normed in rows of one head, as the models do.
    width = heads.shape[-1]
    rows = F.layer_norm(outputs.reshape(-1, width), [width])
    return x + rows.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_behind_the_cut(dynamic: bool) -> None:
    model, inputs = Decoder(LONG, layer=changed(scan)).eval(), prompt(LONG)
    outputs, outcome = run(model, inputs, dynamic=dynamic, retain_tokens=RETAIN, layer=1)
    assert isinstance(outcome, Pruned), outcome
    assert outcome.order_mixing == OrderMixing(1, ("chunk_gated_delta_rule",))
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1, uniform=True))


def continued(layer: Layer, x: Tensor) -> Tensor:
    heads, few = x.unflatten(-1, (2, -1)), x[..., :2]
    width = heads.shape[-1]
    state = layer.table[:width, :width].expand(x.shape[0], 2, -1, -1)
    gates = {"g": -F.softplus(few), "beta": few.sigmoid()}
    outputs, _ = qwen.torch_chunk_gated_delta_rule(*[heads] * 3, **gates, initial_state=state)
    return x + outputs.flatten(2)


def test_a_state_that_comes_with_the_call_is_refused() -> None:
    text = "dartfx.chunk_gated_delta_rule.default reads the token axis"
    declined = assert_declined(Decoder(LONG, layer=changed(continued)), prompt(LONG), text)
    assert "torch_chunk_gated_delta_rule(" in declined.where


def test_other_backends_trace_the_function() -> None:
    prepare_dynamo()
    calls: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        calls.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(plain, backend=backend)(*operands(70), None)
    assert calls
    assert not any("dartfx" in call for call in calls)
