"""The keep_idx [B, S'] returned by pruned graphs, for the option ``tokens`` and decode masks.

Such a graph returns up to four additional small tensors, so that recording works the same
under Inductor, in CUDA graphs and across graph breaks.  Nothing is added where none is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import dartfx.ops.attribution  # registers torch.ops.dartfx.picked_by
import dartfx.ops.nearest_kept  # noqa: F401  registers torch.ops.dartfx.log_group_sizes
from dartfx.passes.graph import Emitter, argument, argument_names
from dartfx.runtime.collecting import collecting
from dartfx.runtime.kept_positions import mark

__all__ = [
    "KeepIdxRecord",
    "KeepIdxRecorder",
    "clear",
    "collect_keep_idx",
    "keep_idx_in_prompt",
    "last_record",
    "return_keep_idx",
]

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class KeepIdxRecord:
    """What a pruned graph kept: keep_idx [B, S'], and vision mask and picker, both [B, S].

    vision_mask: None without the option ``tokens``.  picker: the pivot for which each vision token
    was kept; None for selectors other than "dart".  log_sizes: [B, S'] float32, the logs of the
    sizes of groups; None where attention is not calibrated.
    """

    keep_idx: Tensor
    vision_mask: Tensor | None = None
    picker: Tensor | None = None
    log_sizes: Tensor | None = None


_LOCK = threading.Lock()
_last: KeepIdxRecord | None = None
_collected: ContextVar[list[KeepIdxRecord] | None] = ContextVar("dartfx_keep_idx", default=None)


def last_record() -> KeepIdxRecord | None:
    """The record of the latest pruned graph compiled with the option ``tokens``."""
    with _LOCK:
        return _last


def clear() -> None:
    """Drop the latest record."""
    _store(None)


def _store(record: KeepIdxRecord | None) -> None:
    global _last
    with _LOCK:
        _last = record


def collect_keep_idx() -> AbstractContextManager[list[KeepIdxRecord]]:
    """Collect the records of graphs that run inside the ``with`` block and return keep_idx."""
    return collecting(_collected)


class KeepIdxRecorder:
    """Runs a graph, and records and removes its last outputs.

    added: the names of these in a :class:`KeepIdxRecord`.  note_first: receives the record of the
    first call.
    """

    def __init__(
        self,
        compiled: Compiled,
        added: Sequence[str],
        note_first: Callable[[KeepIdxRecord], None] | None = None,
    ) -> None:
        self._compiled, self._added, self._note_first = compiled, added, note_first

    def __call__(self, *args: Any) -> Any:
        outputs = self._compiled(*args)
        # Copy: a CUDA graph's next run overwrites its outputs.
        last = outputs[-len(self._added) :]
        copies = (tensor.detach().clone() for tensor in last)
        record = KeepIdxRecord(**dict(zip(self._added, copies, strict=True)))
        if self._note_first is not None:
            note, self._note_first = self._note_first, None
            note(record)
        if (collected := _collected.get()) is not None:
            collected.append(record)
        if record.vision_mask is not None:
            _store(record)
        mark(outputs[: -len(last)], record.keep_idx)
        return outputs[: -len(last)]


def return_keep_idx(module: GraphModule, *, tokens: bool) -> list[str]:
    """Append keep_idx to a pruned graph's outputs, with ``tokens`` also vision mask and picker.

    Where attention is calibrated, also the logs of the sizes of groups.  Returns the names of what
    was appended, in a :class:`KeepIdxRecord`.  Positions refer to the prompt; with several cuts,
    keep_idx and picker are those of the last.
    """
    graph = module.graph
    keep_idx, last = keep_idx_in_prompt(graph), _selections(graph)[-1]
    vision_mask = argument(keep_idx[0], "vision_mask")
    added: dict[str, Any] = {"keep_idx": keep_idx[-1]}
    sizes = torch.ops.dartfx.log_group_sizes.default
    for node in graph.find_nodes(op="call_function", target=sizes):
        added["log_sizes"] = node
    if tokens:
        added["vision_mask"] = vision_mask
    # With quotas, pivots differ between images, which the attribution does not model.
    if tokens and argument(last, "selector") == "dart" and argument(last, "quota") is None:
        emit, picked_by = Emitter(keep_idx[-1].next), torch.ops.dartfx.picked_by.default
        picker = emit(picked_by, *(argument(last, name) for name in argument_names(picked_by)))
        if len(keep_idx) > 1:
            picker = emit(torch.ops.dartfx.in_prompt.default, picker, keep_idx[-2], vision_mask)
        added["picker"] = picker
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], *added.values()),)
    graph.lint()
    module.recompile()
    return list(added)


def keep_idx_in_prompt(graph: Graph) -> list[Node]:
    """keep_idx [B, S'] int64 after each cut of a pruned graph, in positions of the prompt.

    A later cut selects among the tokens kept by the one before, so all but the first are computed
    here.
    """
    first, *later = _selections(graph)
    found = [first]
    for select in later:
        found.append(Emitter(select.next)(torch.ops.aten.gather.default, found[-1], 1, select))
    return found


def _selections(graph: Graph) -> list[Node]:
    operator = torch.ops.dartfx.select_tokens.default
    return list(graph.find_nodes(op="call_function", target=operator))
