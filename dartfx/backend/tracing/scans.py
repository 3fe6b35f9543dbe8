"""Scans along the tokens, which dynamo traces as one operator for this backend.

transformers puts a faster implementation in place of a Python function by the function's name
(``use_kernel_func_from_hub_with_fallback``); this goes by the same names, in whichever model's file
they stand.  ``torch.compiler.substitute_in_graph`` replaces them in traces only: an uncompiled
model, and what other backends compile, runs as it is.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dartfx.ops.scans  # noqa: F401  registers them in torch.ops.dartfx
from dartfx import compat

__all__ = ["install"]

log = logging.getLogger(__name__)

Function = Callable[..., Any]

_PACKAGE = "transformers.models."
_LOCK = threading.Lock()
_callback: Callable[..., None] | None = None
_seen: set[str] = set()


def install(ours: Callable[[object], bool]) -> None:
    """Replace the scans of every model file that is loaded when dynamo starts to trace a frame.

    ours: whether what dynamo calls with a frame's graph is this backend.
    """
    global _callback
    with _LOCK:
        if _callback is None:
            _callback = lambda *_: _replace_loaded(ours)  # noqa: E731
        if (handler := compat.find("callback_handler")) is not None:
            if not isinstance(handler.start_callbacks, _Callbacks):
                handler.start_callbacks = _Callbacks(handler.start_callbacks)
            if _callback not in handler.start_callbacks:
                handler.start_callbacks.append(_callback)
    _replace_loaded(ours)


class _Callbacks(list[Callable[..., None]]):
    """Dynamo's list, of which ``torch._dynamo.reset()`` forgets all but this backend's.

    A model that is loaded after it may be one graph, which is traced before any compilation.
    """

    def clear(self) -> None:
        self[:] = [each for each in self if each is _callback]


def _replace_loaded(ours: Callable[[object], bool]) -> None:
    with _LOCK:
        for module in [m for m in list(sys.modules) if m.startswith(_PACKAGE) and m not in _seen]:
            _seen.add(module)
            for name, make in SCANS.items():
                function = vars(sys.modules[module]).get(name)
                if inspect.isfunction(function) and function.__module__ == module:
                    _substitute(function, make(f"{module}:{name}", function, _traces(ours)))


def _substitute(function: Function, traced: Function) -> None:
    try:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(traced)
    except (TypeError, ValueError) as error:  # replaced by someone else, or no plain function
        log.warning("%s is traced step by step: %s", function.__qualname__, error)


def _traces(ours: Callable[[object], bool]) -> Callable[[], bool]:
    def traces_for_us() -> bool:
        translator = compat.find("InstructionTranslator")
        return translator is not None and ours(translator.current_tx().output.compiler_fn)

    # Evaluated while dynamo traces, and a constant of the trace.
    return torch.compiler.assume_constant_result(traces_for_us)  # type: ignore[no-any-return, no-untyped-call]


def _copied(function: Function) -> Function:
    """The function as it is, as an object that is not replaced."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _chunk_gated_delta_rule(path: str, function: Function, ours: Callable[[], bool]) -> Function:
    plain = _copied(function)

    def chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Packed sequences are several scans, and autocast would reach into the function.
        packed = more.get("cu_seqlens") is not None or more.get("seq_idx") is not None
        if packed or not ours() or torch.is_autocast_enabled(query.device.type):
            given = query, key, value, g, beta, chunk_size, initial_state
            result: tuple[Tensor, Tensor | None] = plain(
                *given, output_final_state, use_qk_l2norm_in_kernel, **more
            )
            return result
        operands = query, key, value, g, beta, initial_state
        outputs, state = torch.ops.dartfx.chunk_gated_delta_rule(
            *operands, chunk_size, use_qk_l2norm_in_kernel, path
        )
        return outputs, state if output_final_state else None

    return chunk_gated_delta_rule


def _mamba2_chunk_scan(path: str, function: Function, ours: Callable[[], bool]) -> Function:
    plain = _copied(function)

    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **more: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # Packed sequences are several scans; a gate (z) comes with kernels only.
        other = any(more.get(name) is not None for name in ("cu_seqlens", "seq_idx", "z"))
        if other or not ours() or torch.is_autocast_enabled(hidden_states.device.type):
            given = hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus
            result: Tensor | tuple[Tensor, Tensor] = plain(
                *given, dt_limit, return_final_states, **more
            )
            return result
        operands = hidden_states, dt, A, B, C, D, dt_bias, initial_states
        limits = [float(limit) for limit in dt_limit]
        outputs, state = torch.ops.dartfx.mamba2_chunk_scan(
            *operands, chunk_size, dt_softplus, limits, path
        )
        return (outputs, state) if return_final_states else outputs

    return mamba2_chunk_scan


# What transformers calls them: (its module and name, itself, whether a trace is ours) -> what is
# traced instead.
SCANS: dict[str, Callable[[str, Function, Callable[[], bool]], Function]] = {
    "mamba2_chunk_scan": _mamba2_chunk_scan,
    "torch_chunk_gated_delta_rule": _chunk_gated_delta_rule,
}
