"""Checks that read a tensor, which do not break a graph that dynamo traces for this backend.

transformers compares the placeholders of a prompt with the features of its pictures by
``torch._check_tensor_all``, between the vision tower and the decoder.  dynamo of torch 2.11 puts
that call into its graph as it is and then stumbles over the answer that nobody returned
(``PendingUnbackedSymbolNotFound``); that of 2.13 writes it as ``.item()`` and ``torch._check``,
which still breaks where ``fullgraph=True`` is not given.  Here all frames write it so, since what
this reads decides no shape; other reads break a frame as ever.  Where prefills are recorded as CUDA
graphs, which hold nothing that the host reads, ``backend/split_checks.py`` takes it out again.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from dartfx import compat
from dartfx.compat import Unavailable

__all__ = ["allow_reading", "install", "uninstall", "unwrapped"]

log = logging.getLogger(__name__)

Handler = Callable[..., Any]

_LOCK = threading.Lock()
_before: dict[Any, Handler | None] = {}  # dynamo's handler of what was replaced, if any


def install(ours: Callable[[object], bool]) -> None:
    """Trace these checks in the frames of our backend.  Idempotent.

    ours: whether what dynamo calls with a frame's graph is that backend.
    """
    with _LOCK:
        if _before:
            return
        try:
            handlers = compat.TorchInGraphFunctionVariable._get_handlers()
            check, _, _ = compat.check_tensor_all, compat.check, compat.wrap_fx_proxy
        except (AttributeError, Unavailable) as error:
            log.warning("checks between a vision tower and its decoder break the graph: %s", error)
            return
        _before[check] = handlers.get(check)
        handlers[check] = _handler(_before[check], ours)


def uninstall() -> None:
    """Restore dynamo's own handling; :func:`install` may then be called again."""
    with _LOCK:
        handlers = compat.TorchInGraphFunctionVariable._get_handlers() if _before else {}
        for check, before in _before.items():
            if before is None:
                del handlers[check]
            else:
                handlers[check] = before
        _before.clear()


def allow_reading(graph: Graph) -> None:
    """Let the passes and Inductor trace again what these checks read in a frame's graph."""
    for node in graph.find_nodes(op="call_method", target="item"):
        if isinstance(number := node.meta.get("example_value"), torch.SymInt):
            _allow(number.node.shape_env, True)


def _allow(shape_env: Any, reading: bool) -> bool:
    """Set whether a tensor may be read as a new symbol; whether it might before."""
    before: bool = shape_env.settings.allow_scalar_outputs
    if before != reading:
        shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=reading)
    return before


def _handler(before: Handler | None, ours: Callable[[object], bool]) -> Handler:
    def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        backend = tx.output.compiler_fn
        if len(args) == 1 and not kwargs and ours(backend):
            every = args[0].call_method(tx, "_is_all_true", [], {})
            if isinstance(every.as_proxy().node.meta.get("example_value"), Tensor):
                return _checked(tx, every)
        return None if before is None else before(self, tx, *args, **kwargs)

    return handle


def unwrapped(backend: object) -> object:
    """A backend without what dynamo wraps it in."""
    backend = getattr(backend, "_torchdynamo_orig_backend", backend)
    return getattr(backend, "compiler_fn", backend)


def _checked(tx: Any, every: Any) -> Any:
    """``torch._check(every.long().item() >= 1)``, written into the graph.

    A number and no bool: torch 2.11 cannot trace the comparison that reading a bool ends in.
    """

    def write(op: str, target: Any, *args: Any) -> Any:
        node = tx.output.create_proxy(op, target, args, {})
        return compat.wrap_fx_proxy(tx=tx, proxy=node)

    number = every.call_method(tx, "long", [], {})
    before = _allow(tx.output.shape_env, True)
    try:
        answer = write("call_method", "item", number.as_proxy())
    finally:
        _allow(tx.output.shape_env, before)  # what else a frame reads may decide its shapes
    holds = write("call_function", operator.ge, answer.as_proxy(), 1)
    return write("call_function", compat.check, holds.as_proxy())
