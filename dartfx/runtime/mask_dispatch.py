"""Compiled graphs that pass a vision mask at run time across dynamo's graph breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dartfx.passes.analysis.prefilter import has_causal_attention
from dartfx.passes.frontend.normalise import example_values
from dartfx.passes.graph import is_one, is_state, module_paths, same_size, split_index
from dartfx.passes.outcome import Outcome, Pruned, Unchanged
from dartfx.passes.refusal import Declined
from dartfx.passes.request import Request
from dartfx.runtime import call_budget, graph_runs, vision_mask
from dartfx.runtime.call_budget import CallBudget, not_honoured

__all__ = ["MaskDispatcher", "MaskProducer", "compile_apart", "prompts"]

Compiled = Callable[..., Any]
Lower = Callable[[GraphModule, Sequence[Any]], Compiled]


def compile_apart(module: GraphModule, lower: Lower) -> Compiled:
    """Compile outside dynamo's call, which may be over, with separate guards on the inputs."""
    # Dynamo inlines a plain GraphModule, but not the lazily recompiled kind that it creates.
    module = GraphModule(module, module.graph)

    def run(*args: Any) -> Any:
        return module(*args)

    # Dynamo counts recompilations per code object, so every graph gets a separate one.
    run.__code__ = run.__code__.replace(co_name=f"run_{id(module):x}")
    return torch.compile(run, backend=lower, fullgraph=True)


class MaskProducer:
    """Runs a graph that returns ``(*outputs, mask, row_count)``; records the mask of one output.

    earlier: the inputs that the output derives from; what an earlier graph merged into one of them
    (images, where this one merges videos) is part of the mask.
    """

    def __init__(self, compiled: Compiled, index: int, earlier: Sequence[int] = ()) -> None:
        self._compiled, self._index, self._earlier = compiled, index, earlier

    def __call__(self, *args: Any) -> Any:
        # Read before the graph runs, since it may mutate its inputs.
        noted = [found for i in self._earlier if (found := vision_mask.find(args[i])) is not None]
        *outputs, mask, row_count = self._compiled(*args)
        rows = row_count.shape[0]
        for found in noted:
            mask, rows = mask | found.mask, rows + found.rows
        vision_mask.record(outputs[self._index], mask, rows)
        return tuple(outputs)


class IncomingMask(NamedTuple):
    """A mask for one call.  embeds: the input it was recorded for, or None if the caller gave it;
    like: an input with the mask's [B, S]."""

    embeds: int | None
    like: int
    record: vision_mask.MaskRecord


class MaskDispatcher:
    """Runs a decoder's graph pruned if its embeddings come with a mask, else unchanged.

    Which one a call needs is known only at run time, and dynamo guards on neither, so each is built
    on first use.  original: the unpruned graph; announce: reports every outcome; rewrite: prunes
    the graph for such a mask; compile_pruned: compiles the result; lower: compiles ``original``;
    compare_ranks: returns every rank's value if they differ, else None; request_for: replaces
    ``request`` for a call with its own budget, None if no call has one; otherwise: runs calls
    without a mask if the graph merges tokens itself, in place of the unchanged graph.
    """

    def __init__(
        self,
        module: GraphModule,
        original: GraphModule,
        request: Request,
        *,
        announce: Callable[[Outcome], None],
        rewrite: Callable[[Request, IncomingMask], tuple[Outcome | None, GraphModule, int | None]],
        compile_pruned: Callable[[Pruned, GraphModule, Request], Compiled],
        lower: Lower,
        compare_ranks: Callable[[object], list[Any] | None],
        request_for: Callable[[CallBudget], Request] | None,
        otherwise: Callable[[], Compiled] | None,
    ) -> None:
        self._module, self._original, self._request = module, original, request
        self._announce, self._rewrite, self._lower = announce, rewrite, lower
        self._compile_pruned, self._compare_ranks = compile_pruned, compare_ranks
        self._request_for, self._otherwise = request_for, otherwise
        self._embeds, self._ids = prompts(module)
        self._unpruned: Compiled | None = None
        self._pruned: dict[tuple[int | None, str], Compiled | None] = {}
        self._all_retained: set[tuple[int, int]] = set()
        self._lock = threading.RLock()

    @property
    def may_receive_masks(self) -> bool:
        """Whether a later call could bring a mask, which a decode step never does."""
        return bool(self._embeds or self._ids)

    def unexplained_inputs(self) -> list[str]:
        """Floating-point inputs that could hold vision tokens, as ``float32 [1, 630, 4096]``.

        A text prompt comes as token ids, perhaps with a mask of their shape; embeddings, pixels or
        features may hold more than text.  Empty for a graph without causal attention, such as a
        vision tower.
        """
        if not self.may_receive_masks or not has_causal_attention(self._module.graph):
            return []
        values = example_values(self._module)
        of_ids = [values[index].shape for index in self._ids]
        return [
            f"{str(value.dtype).removeprefix('torch.')} {[str(s) for s in value.shape]}"
            for node in self._module.graph.nodes
            if node.op == "placeholder" and isinstance(value := node.meta["example_value"], Tensor)
            if value.is_floating_point() and value.ndim > 1 and not _is_state_or_cache(node)
            if not any(_same_shape(value.shape, shape) for shape in of_ids)
        ]

    def prepare(self, inputs: Sequence[Any]) -> None:
        """Compile what the current call needs.

        Raises UnsupportedGraphError through ``announce`` when that call cannot be pruned.
        """
        incoming = self._incoming(inputs)
        if incoming is None or self._pruned_for(incoming) is None:
            self._unpruned = self._lower(self._original, inputs)

    def __call__(self, *args: Any) -> Any:
        incoming = self._incoming(args)
        graph_runs.note_run(incoming is not None)
        pruned = self._pruned_for(incoming) if incoming is not None else None
        if incoming is not None and pruned is not None:
            mask, rows = incoming.record.mask, incoming.record.rows
            budget = self._budget()
            given = [] if budget is None else [budget.as_input((mask,))]
            return pruned(*given, mask, mask.new_empty((rows, 0)), *args)
        if self._unpruned is None:
            with self._lock:
                self._unpruned = self._unpruned or self._without_mask()
        return self._unpruned(*args)

    def _without_mask(self) -> Compiled:
        if self._otherwise is not None:
            return self._otherwise()
        return compile_apart(self._original, self._lower)

    def _incoming(self, inputs: Sequence[Any]) -> IncomingMask | None:
        """The mask for these inputs on every rank."""
        incoming = self.incoming(inputs)
        came = None if incoming is None else [incoming.embeds, incoming.like, incoming.record.rows]
        # A graph without embeddings, such as a decode step's, has no records for them.
        may_come = self._embeds or vision_mask.given() is not None
        by_rank = self._compare_ranks(came) if may_come else None
        if by_rank is None:
            return incoming
        self._announce(
            Declined(
                "the vision tokens of a call differ between the ranks of a tensor-parallel model "
                f"(input, input of the mask's shape, feature rows, by rank: {by_rank})",
                advice="the same inputs, and dartfx.vision_tokens, on every rank",
            )
        )
        return None

    def incoming(self, inputs: Sequence[Any]) -> IncomingMask | None:
        """The mask for these inputs: recorded for one of them, given, or found by comparison."""
        for index in self._embeds:
            noted = vision_mask.find(inputs[index])
            if noted is not None:
                return IncomingMask(index, index, noted)
        if vision_mask.given() is not None:
            for index in (*self._embeds, *self._ids):
                given = vision_mask.given_for(*inputs[index].shape[:2])
                if given is not None:
                    return IncomingMask(None, index, given)
        for index in self._embeds:
            compared = vision_mask.compared(inputs[index])
            if compared is not None:
                return IncomingMask(index, index, compared)
        return None

    def _budget(self) -> CallBudget | None:
        """The budget of this call, where it is not the options'."""
        return None if self._request_for is None else call_budget.active()

    def _pruned_for(self, incoming: IncomingMask) -> Compiled | None:
        with self._lock:
            budget, request = self._budget(), self._request
            if budget is not None and self._request_for is not None:
                request = self._request_for(budget)
            # Holds only for this number of rows: a later image may be larger.
            size = incoming.record.rows, incoming.record.mask.shape[0]
            if budget is None and size in self._all_retained:
                return None
            key = incoming.embeds, "" if budget is None else budget.kind
            if key not in self._pruned:
                outcome, module, _ = self._rewrite(request, incoming)
                assert outcome is not None
                self._announce(outcome)
                if isinstance(outcome, Unchanged) and outcome.all_retained:
                    self._all_retained.add(size)
                else:
                    self._pruned[key] = self._compiled(outcome, module, request)
            return self._pruned.get(key)

    def _compiled(self, outcome: Outcome, module: GraphModule, request: Request) -> Compiled | None:
        if isinstance(outcome, Pruned):
            return self._compile_pruned(outcome, module, request)
        if request.varies:
            raise not_honoured(getattr(outcome, "because", None))
        return None


def _same_shape(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal for all inputs; adds no guard."""
    return len(one) == len(other) and all(map(same_size, one, other))


def _is_state_or_cache(node: Node) -> bool:
    """Whether a dynamo input is a parameter, a buffer, a layer's KV cache or other state."""
    if is_state(node):
        return True
    # Code for a decode mask reads a cache's size, which says nothing about its contents.
    reads = [module_paths(user) for user in node.users if user.target not in ("numel", "size")]
    in_layers = all(any(map(split_index, paths)) for paths in reads)
    # A convolution's state is read by submodules of a layer, hidden states by the layer itself.
    inside = in_layers and all(split_index(paths[-1]) is None for paths in reads)
    return in_layers if (ndim := node.meta["example_value"].ndim) == 4 else ndim == 3 and inside


def prompts(module: GraphModule) -> tuple[list[int], list[int]]:
    """Inputs that may be a prompt: embeddings [B, S, D] and token ids [B, S], S > 1."""
    embeds, ids = [], []
    for index, value in enumerate(example_values(module)):
        if not isinstance(value, Tensor) or value.ndim not in (2, 3) or is_one(value.shape[1]):
            continue
        if value.ndim == 3 and value.is_floating_point():
            embeds.append(index)
        elif value.ndim == 2 and value.dtype in (torch.int32, torch.int64):
            ids.append(index)
    return embeds, ids
