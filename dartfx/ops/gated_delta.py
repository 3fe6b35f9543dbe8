"""``torch.ops.dartfx.chunk_gated_delta_rule``: a scan along the tokens as one operator of a graph.

The Python of transformers cuts the sequence into chunks and loops over them, so a trace holds as
many steps as one length takes, and a prompt of another length, or a pruned one, needs another
trace.  The operator calls that same function, whichever implementation transformers chose for it,
when it runs; so results are those of the uncompiled model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

__all__ = ["chunk_gated_delta_rule"]

# The operands that gradients reach, by their place.
_DIFFERENTIABLE = 6


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _run(
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


_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, Tensor? initial_state, "
    "int chunk_size, bool normalise, str function"
)

chunk_gated_delta_rule = custom_op(
    "dartfx::chunk_gated_delta_rule",
    _run,
    mutates_args=(),
    schema=f"({_OPERANDS}) -> (Tensor, Tensor)",
)


@chunk_gated_delta_rule.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """query, key [B, S, Hk, Dk]; value [B, S, Hv, Dv]: what value is, and the state behind it."""
    rows, _, heads, width = value.shape
    state = value.new_empty((rows, heads, key.shape[-1], width), dtype=torch.float32)
    return value.new_empty(value.shape, dtype=query.dtype), state


def _run_backward(
    grad_outputs: Tensor, grad_state: Tensor, needed: Sequence[bool], *call: Any
) -> list[Tensor]:
    """The gradients of the operands that need one, by running the scan once more."""
    places = [place for place, need in enumerate(needed) if need]

    def scan(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        operands = [*call]
        for place, operand in zip(places, wanted, strict=True):
            operands[place] = operand
        return _run(*operands)

    # Not torch.autograd.grad, which nothing reaches below an operator.
    gradients = torch.func.vjp(scan, *(call[place] for place in places))[1]
    return [g.contiguous() for g in gradients((grad_outputs, grad_state))]


_backward_op = custom_op(
    "dartfx::chunk_gated_delta_rule_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor grad_outputs, Tensor grad_state, bool[] needed, {_OPERANDS}) -> Tensor[]",
)


@_backward_op.register_fake
def _backward_fake(
    grad_outputs: Tensor, grad_state: Tensor, needed: Sequence[bool], *call: Any
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(call, needed, strict=False)
        if need and x is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:_DIFFERENTIABLE])
    ctx.rest = inputs[_DIFFERENTIABLE:]


def _backward(ctx: Any, grad_outputs: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    found = iter(_backward_op(grad_outputs, grad_state, needed, *ctx.saved_tensors, *ctx.rest))
    return (*(next(found) if need else None for need in needed), *(None for _ in ctx.rest))


chunk_gated_delta_rule.register_autograd(_backward, setup_context=_setup)
