"""Tensor parallelism: ranks that compile the same graph agree on its outcome.

All ranks compile the same graphs in the same order, each on its own shards.  A graph pruned on one
rank only would leave the others waiting in a collective, so ranks exchange a graph's outcome before
they compile it.  They use the process group's key-value store, which can identify a rank that does
not answer and does not interfere with the model's collectives.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule

import dartfx.ops.rank_hash  # noqa: F401  registers torch.ops.dartfx.hash_indices
from dartfx import compat
from dartfx.errors import ConfigError, RanksError
from dartfx.passes.distributed.shards import dtensors, groups
from dartfx.passes.distributed.to_local_tensors import LocalGraph, to_local_tensors
from dartfx.passes.frontend.unwrap_subclasses import PlainGraph, unwrap_subclasses
from dartfx.passes.outcome import Outcome, Pruned, Unchanged
from dartfx.passes.refusal import Declined

__all__ = ["TIMEOUT_VARIABLE", "Ranks"]

TIMEOUT_VARIABLE = "DARTFX_RANKS_TIMEOUT"
_TIMEOUT = 600.0  # seconds; other ranks may still be compiling the previous graph
_ALL_OR_NONE = "a tensor-parallel model is pruned on every rank or on none"

Compiled = Callable[..., Any]


class Ranks:
    """The ranks that one dynamo graph runs on: one process, or a tensor-parallel group."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._input_count = len(module.graph.find_nodes(op="placeholder"))
        named = groups(module.graph)
        # With several groups the relevant one is unknown, so every rank refuses the graph.
        self.group = min(named) if len(named) == 1 else ""

    @cached_property
    def _local(self) -> LocalGraph | None:
        return to_local_tensors(self._module) if dtensors(self._module.graph) else None

    @cached_property
    def _plain(self) -> PlainGraph | None:
        return unwrap_subclasses(self._module if self._local is None else self._local.module)

    @property
    def module(self) -> GraphModule:
        """The graph over local, plain tensors; dynamo's own if all of its tensors are plain.

        Raises Refusal if there is no such graph.
        """
        if self._plain is not None:
            return self._plain.module
        return self._module if self._local is None else self._local.module

    def inputs(self, given: Sequence[Any]) -> Sequence[Any]:
        """Convert inputs of dynamo's graph to inputs of :attr:`module`.

        Leading inputs added to a rewritten graph (a mask, a budget) are unchanged.
        """
        added = len(given) - self._input_count
        local = given[added:] if self._local is None else self._local.inputs(given[added:])
        return [*given[:added], *(local if self._plain is None else self._plain.inputs(local))]

    def input_index(self, index: int) -> int:
        """The position of dynamo's input ``index`` among the inputs of :attr:`module`."""
        local = index if self._local is None else self._local.taken.index(index)
        return local if self._plain is None else self._plain.starts[local]

    def wrap(self, compiled: Compiled) -> Compiled:
        """Wrap code compiled for :attr:`module` in a callable that takes dynamo's inputs."""
        if self._local is None and self._plain is None:
            return compiled
        return lambda *args: compiled(*self.inputs(args))

    def agree(self, outcome: Outcome | None) -> Outcome | None:
        """Return this graph's outcome on all ranks: ``outcome`` if all ranks have the same.

        Every rank must call this for the same graphs.  If one declined, all do.  Raises RanksError
        if a rank does not answer in time.
        """
        if not self.group:
            return outcome
        mine = _RankOutcome.of(outcome)
        outcomes = [_RankOutcome(**t) for t in _exchange(self.group, mine.__dict__)]
        if all(t == outcomes[0] for t in outcomes):
            return outcome
        refused = [(rank, t) for rank, t in enumerate(outcomes) if t.kind == "Declined"]
        if not refused:
            return Declined(
                f"the ranks have different outcomes: {_listed(outcomes)}; {_ALL_OR_NONE}"
            )
        rank, first = refused[0]
        if isinstance(outcome, Declined):
            return replace(outcome, may_retry_with_graph_breaks=first.may_retry_with_graph_breaks)
        return Declined(
            f"rank {rank} of {len(outcomes)} cannot prune its part of this graph ({first.what}), "
            f"and {_ALL_OR_NONE}",
            advice=first.advice,
            may_retry_with_graph_breaks=first.may_retry_with_graph_breaks,
        )

    def compare(self, fact: object) -> list[Any] | None:
        """Return every rank's ``fact`` (plain data) if they differ, else None."""
        if not self.group:
            return None
        facts = [t["fact"] for t in _exchange(self.group, {"fact": fact})]
        return None if all(fact == facts[0] for fact in facts) else facts


@dataclass(frozen=True)
class _RankOutcome:
    """The part of an outcome that ranks exchange and that must be equal on all ranks."""

    kind: str
    what: str = ""
    advice: str = ""
    may_retry_with_graph_breaks: bool = False

    @classmethod
    def of(cls, outcome: Outcome | None) -> _RankOutcome:
        kind = type(outcome).__name__
        if isinstance(outcome, Declined):
            return cls(kind, outcome.because, outcome.advice, outcome.may_retry_with_graph_breaks)
        if isinstance(outcome, Pruned):
            cuts = [
                (c.layer, c.vision_tokens, c.retained, c.sequence, c.across) for c in outcome.cuts
            ]
            return cls(kind, f"{outcome.stack} {cuts} {outcome.kv_layout} {outcome.how}")
        return cls(kind, str(isinstance(outcome, Unchanged) and outcome.all_retained))


def _listed(outcomes: Sequence[_RankOutcome]) -> str:
    return ", ".join(f"rank {rank}: {t.kind} {t.what}" for rank, t in enumerate(outcomes))


_LOCK = threading.Lock()
_exchanged: dict[str, int] = {}
_exchanged_in: Any = None


def _exchange(group: str, mine: object) -> list[Any]:
    """All-gather plain data in rank order; all ranks must make the same number of calls."""
    members = torch.distributed.get_process_group_ranks(compat.resolve_process_group(group))
    me, store = torch.distributed.get_rank(), compat.get_default_store()
    number = _next(store, group)

    def key(rank: int, number: int) -> str:
        return f"dartfx/{group}/{number}/{rank}"

    store.set(key(me, number), json.dumps(mine))
    deadline = time.monotonic() + _timeout()
    found = []
    for rank in members:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait([key(rank, number)], left)
        except RuntimeError as error:
            late = [r for r in members if not store.check([key(r, number)])]
            if not late:
                raise
            raise _unanswered(group, me, late) from error
        found.append(json.loads(store.get(key(rank, number))))
    # All ranks have answered this exchange, so all have read the previous one.
    store.delete_key(key(me, number - 1))
    return found


def _next(store: Any, group: str) -> int:
    global _exchanged_in
    with _LOCK:
        if store is not _exchanged_in:  # the process group was created again
            _exchanged.clear()
            _exchanged_in = store
        _exchanged[group] = _exchanged.get(group, 0) + 1
        return _exchanged[group]


def _timeout() -> float:
    given = os.environ.get(TIMEOUT_VARIABLE)
    try:
        seconds = _TIMEOUT if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{TIMEOUT_VARIABLE}={given!r} is not a positive number of seconds")
    return seconds


def _unanswered(group: str, me: int, late: Sequence[int]) -> RanksError:
    return RanksError(
        f"rank {me} waited {_timeout():g} s for ranks {list(late)} of process group {group!r} to "
        "report their outcome of the same graph. They failed, received another call, or are still "
        f"compiling: see their own output; {TIMEOUT_VARIABLE} sets another number of seconds"
    )
