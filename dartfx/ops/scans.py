"""Scans along the tokens, each one operator of a graph.

``torch.ops.dartfx.chunk_gated_delta_rule`` and ``torch.ops.dartfx.mamba2_chunk_scan``.  The Python
of transformers cuts the sequence into chunks, so a trace holds what one length takes, and a prompt
of another length, or a pruned one, needs another trace.  The operator calls that same function,
whichever implementation transformers chose for it, when it runs; so results are those of
the uncompiled model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

__all__ = ["chunk_gated_delta_rule", "mamba2_chunk_scan"]

Run = Callable[..., tuple[Tensor, Tensor]]


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _scan(name: str, tensors: str, others: str, run: Run, fake: Run) -> Any:
    """The operator (outputs, state) of a scan, and one for its gradients.

    tensors: the schema of the operands that gradients reach, which come first; others: of the rest,
    the last of which names the function.
    """
    operands, differentiable = f"{tensors}, {others}", tensors.count(",") + 1
    scan = custom_op(
        f"dartfx::{name}", run, mutates_args=(), schema=f"({operands}) -> (Tensor, Tensor)"
    )
    scan.register_fake(fake)

    def run_backward(
        grad_outputs: Tensor, grad_state: Tensor, needed: Sequence[bool], *call: Any
    ) -> list[Tensor]:
        """The gradients of the operands that need one, by running the scan again."""
        indices = [index for index, need in enumerate(needed) if need]

        def again(*wanted: Tensor) -> tuple[Tensor, Tensor]:
            given = [*call]
            for index, operand in zip(indices, wanted, strict=True):
                given[index] = operand
            return run(*given)

        # Not torch.autograd.grad, which nothing reaches below an operator.
        gradients = torch.func.vjp(again, *(call[index] for index in indices))[1]
        return [g.contiguous() for g in gradients((grad_outputs, grad_state))]

    backward_op = custom_op(
        f"dartfx::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad_outputs, Tensor grad_state, bool[] needed, {operands}) -> Tensor[]",
    )
    backward_op.register_fake(_backward_fake)

    _differentiate(scan, backward_op, differentiable)
    return scan


def _differentiate(scan: Any, backward_op: Any, differentiable: int) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.save_for_backward(*inputs[:differentiable])
        ctx.rest = inputs[differentiable:]

    def backward(ctx: Any, grad_outputs: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
        needed = list(ctx.needs_input_grad[:differentiable])
        found = iter(backward_op(grad_outputs, grad_state, needed, *ctx.saved_tensors, *ctx.rest))
        return (*(next(found) if need else None for need in needed), *(None for _ in ctx.rest))

    scan.register_autograd(backward, setup_context=setup)


def _backward_fake(
    grad_outputs: Tensor, grad_state: Tensor, needed: Sequence[bool], *call: Any
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(call, needed, strict=False)
        if need and x is not None
    ]


# --- the gated delta rule -----------------------------------------------------------------------


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
    normalise: bool,
    function: str,
) -> tuple[Tensor, Tensor]:
    outputs, state = _function(function)(
        query,
        key,
        value,
        g=g,
        beta=beta,
        chunk_size=chunk_size,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
    )
    return outputs.contiguous(), state.contiguous()


def _delta_rule_fake(
    query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """query, key [B, S, Hk, Dk]; value [B, S, Hv, Dv]: what value is, and the state behind it."""
    rows, _, heads, width = value.shape
    state = value.new_empty((rows, heads, key.shape[-1], width), dtype=torch.float32)
    return value.new_empty(value.shape, dtype=query.dtype), state


chunk_gated_delta_rule = _scan(
    "chunk_gated_delta_rule",
    "Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor? initial_state",
    "int chunk_size, bool normalise, str function",
    _delta_rule,
    _delta_rule_fake,
)


# --- Mamba-2 ------------------------------------------------------------------------------------


def _mamba2(
    hidden_states: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_limit: Sequence[float],
    function: str,
) -> tuple[Tensor, Tensor]:
    outputs, state = _function(function)(
        hidden_states,
        dt,
        a,
        b,
        c,
        chunk_size=chunk_size,
        D=d,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=dt_softplus,
        dt_limit=tuple(dt_limit),
        return_final_states=True,
    )
    # The Python of transformers returns float32, a kernel the operands' dtype.
    return outputs.float().contiguous(), state.float().contiguous()


def _mamba2_fake(
    hidden_states: Tensor, dt: Tensor, a: Tensor, b: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    """hidden_states [B, S, H, P]; b, c [B, S, G, N]: the same in float32, and [B, H, P, N]."""
    rows, _, heads, width = hidden_states.shape
    state = hidden_states.new_empty((rows, heads, width, b.shape[-1]), dtype=torch.float32)
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.float32), state


mamba2_chunk_scan = _scan(
    "mamba2_chunk_scan",
    "Tensor hidden_states, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? dt_bias, "
    "Tensor? initial_states",
    "int chunk_size, bool dt_softplus, float[] dt_limit, str function",
    _mamba2,
    _mamba2_fake,
)
