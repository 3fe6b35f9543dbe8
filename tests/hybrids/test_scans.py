"""Scans as single operators: values, gradients, and use behind a cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.callback import callback_handler
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from dartfx.backend.graph_compiler import prepare_dynamo
from dartfx.backend.tracing import scans
from dartfx.passes.outcome import OrderMixing, Pruned
from tests.support.plain.decoders import (
    Decoder,
    Layer,
    Sizes,
    assert_same,
    changed,
    prompt,
    pruned_by_hand,
    run,
)
from tests.support.plain.refusals import assert_declined

LONG = Sizes(layers=2, batch=2, seq=150, vision=110)  # three chunks of 64; one when pruned
RETAIN = 9
PATH = f"{qwen.__name__}:torch_chunk_gated_delta_rule"
MAMBA = f"{nemotron.__name__}:mamba2_chunk_scan"
CHUNK, LIMITS = 16, (0.01, float("inf"))


def of_mamba(length: int, rows: int = 2) -> list[Tensor]:
    """hidden_states [B, S, 4, 3]; dt [B, S, 4]; a [4]; b, c [B, S, 2, 5]; d, dt_bias [4]."""
    hidden, dt = torch.randn(rows, length, 4, 3), torch.randn(rows, length, 4)
    b, c = torch.randn(2, rows, length, 2, 5)
    return [hidden, dt, -torch.rand(4), b, c, torch.randn(4), torch.randn(4)]


def mamba_operator(*given: Tensor | None) -> Any:
    return torch.ops.dartfx.mamba2_chunk_scan(*given, CHUNK, True, LIMITS, MAMBA)


def mamba_plain(*given: Tensor | None) -> Any:
    hidden, dt, a, b, c, d, bias, state = given
    more = {"D": d, "dt_bias": bias, "initial_states": state, "dt_limit": LIMITS}
    return nemotron.mamba2_chunk_scan(
        hidden, dt, a, b, c, CHUNK, **more, dt_softplus=True, return_final_states=True
    )


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


mamba2_only = pytest.mark.skipif(
    not hasattr(nemotron, "mamba2_chunk_scan"), reason="this transformers has no function for it"
)
MAMBA2 = pytest.param("mamba2_chunk_scan", marks=mamba2_only)

REGISTERED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "chunk_gated_delta_rule": (operands, (None, 64, True, PATH)),
    "mamba2_chunk_scan": (of_mamba, (None, CHUNK, True, list(LIMITS), MAMBA)),
}


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", MAMBA2])
def test_the_operator_is_registered_right(name: str) -> None:
    make, rest = REGISTERED[name]
    torch.library.opcheck(
        getattr(torch.ops.dartfx, name).default,
        (*(x.requires_grad_() for x in make(70)), *rest),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


BOTH: dict[str, tuple[Any, Any, Any]] = {
    "chunk_gated_delta_rule": (plain, through_the_operator, operands),
    "mamba2_chunk_scan": (mamba_plain, mamba_operator, of_mamba),
}


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", MAMBA2])
def test_values_and_gradients_are_those_of_the_function(name: str) -> None:
    function, operator, make = BOTH[name]
    state = torch.randn(2, 4, 3, 5) if make is of_mamba else torch.randn(2, 4, 4, 3)
    found = []
    for scanned in (function, operator):
        torch.manual_seed(1)
        given = [x.requires_grad_() for x in (*make(70), state.clone())]
        given[3] = given[3].detach()  # one that needs no gradient
        outputs, last = scanned(*given)
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


def mamba(layer: Layer, x: Tensor) -> Tensor:
    heads, few = x.unflatten(-1, (2, -1)), x[..., :2]
    decay = -layer.table[0, :2].exp()
    outputs = nemotron.mamba2_chunk_scan(
        heads, few, decay, heads, heads, CHUNK, D=decay, dt_softplus=True, z=None
    )
    return x + F.layer_norm(outputs.flatten(2), [x.shape[-1]])


BEHIND = {"chunk_gated_delta_rule": scan, "mamba2_chunk_scan": mamba}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", MAMBA2])
def test_behind_the_cut(name: str, dynamic: bool) -> None:
    model, inputs = Decoder(LONG, layer=changed(BEHIND[name])).eval(), prompt(LONG)
    outputs, outcome = run(model, inputs, dynamic=dynamic, retain_tokens=RETAIN, layer=1)
    assert isinstance(outcome, Pruned), outcome
    assert outcome.order_mixing == OrderMixing(1, (name,))
    with torch.no_grad():
        assert_same(outputs, pruned_by_hand(model, inputs, RETAIN, 1, uniform=True))


def continued(layer: Layer, x: Tensor) -> Tensor:
    heads, few = x.unflatten(-1, (2, -1)), x[..., :2]
    width = heads.shape[-1]
    state = layer.table[:width, :width].expand(x.shape[0], 2, -1, -1)
    gates = {"g": -F.softplus(few), "beta": few.sigmoid()}
    outputs, _ = qwen.torch_chunk_gated_delta_rule(*[heads] * 3, **gates, initial_state=state)
    return x + outputs.flatten(2)


def mamba_continued(layer: Layer, x: Tensor) -> Tensor:
    heads, width = x.unflatten(-1, (2, -1)), x.shape[-1] // 2
    state = layer.table[:width, :width].expand(x.shape[0], 2, -1, -1)
    few, decay = x[..., :2].sigmoid(), -layer.table[0, :2].exp()
    outputs = nemotron.mamba2_chunk_scan(
        heads, few, decay, heads, heads, CHUNK, initial_states=state
    )
    return x + outputs.flatten(2)


CONTINUED = {"chunk_gated_delta_rule": continued, "mamba2_chunk_scan": mamba_continued}


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", MAMBA2])
def test_a_state_that_comes_with_the_call_is_refused(name: str) -> None:
    text = f"dartfx.{name}.default reads the token axis"
    declined = assert_declined(Decoder(LONG, layer=changed(CONTINUED[name])), prompt(LONG), text)
    assert f"{name}(" in declined.where


def test_other_backends_trace_the_function() -> None:
    prepare_dynamo()
    calls: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        calls.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(plain, backend=backend)(*operands(70), None)
    assert calls
    assert not any("dartfx" in call for call in calls)


def test_models_that_are_loaded_after_dynamo_was_reset_are_looked_through() -> None:
    """Before anything is compiled: the first graph may be all of a hybrid model."""
    torch.compile(torch.neg, backend="dart")(torch.ones(2))
    callback_handler.register_start_callback(lambda *_: None)
    torch.compiler.reset()
    assert callback_handler.start_callbacks == [scans._callback]
