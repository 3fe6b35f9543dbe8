"""Prompt positions of a pruned graph's outputs, and later graphs that must not consume these.

Outputs with a token axis carry keep_idx [B, S']: for the caller, to find labels or the last token,
and for later graphs of the call.  Such a graph (after a graph break) may index by a position of the
prompt, which can be in range and yet denote another token of the shorter sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from dartfx.errors import SelectionError
from dartfx.passes.graph import depends_on_data, hint, is_state, source_line

__all__ = [
    "PositionsAfterCut",
    "ShortCaches",
    "TakesShortened",
    "kept_positions",
    "mark",
    "uses_of_positions",
]

_KEPT = "_dartfx_keep_idx"
_INDEXES = {
    torch.gather,
    torch.index_select,
    torch.take_along_dim,
    torch.Tensor.gather,
    torch.Tensor.index_select,
}
_METHODS = {"gather", "index_select", "take_along_dim"}


class PositionsAfterCut(SelectionError):
    """A later graph of a call indexes a pruned graph's outputs by positions of the prompt."""


def kept_positions(output: Any) -> Tensor | None:
    """The prompt position of every token in a pruned call's output: [B, S'] int64, ascending.

    output: the result of a model compiled by :func:`dartfx.compile`, or a tensor [B, S', ...] of
    it.  Returns None if nothing was pruned: positions are then the prompt's.  To gather labels for
    your own loss: ``kept = dartfx.kept_positions(output); labels.gather(1, kept)``.
    """
    found: Tensor | None = _attached(output)
    return found


# Dynamo breaks the graph here: inside a graph it loses attributes of tensors.
@torch.compiler.disable(reason="a graph's outputs carry positions")  # type: ignore[untyped-decorator,no-untyped-call]
def _attached(output: Any) -> Tensor | None:
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, Tensor) or not isinstance(output, Mapping | list | tuple):
        parts = [output]
    marks = (getattr(part, _KEPT, None) for part in parts)
    return next((keep_idx for keep_idx in marks if keep_idx is not None), None)


def mark(outputs: Sequence[Any], keep_idx: Tensor) -> None:
    """Attach keep_idx [B, S'] to outputs [B, S', ...]."""
    for output in outputs:
        if isinstance(output, Tensor) and output.ndim > 2 and output.shape[:2] == keep_idx.shape:
            setattr(output, _KEPT, keep_idx)


def uses_of_positions(graph: Graph) -> dict[int, str]:
    """Inputs of a dynamo graph that are indexed by unrelated numbers, and where."""
    uses = {index: _position_use(node) for index, node in _may_be_shortened(graph)}
    return {index: source_line(use) for index, use in uses.items() if use is not None}


def _may_be_shortened(graph: Graph) -> list[tuple[int, Node]]:
    """Inputs of a dynamo graph that may have a token axis: non-parameter floats [B, S, ...]."""
    return [
        (index, node)
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
        if isinstance(value := node.meta.get("example_value"), Tensor)
        and value.is_floating_point()
        and value.ndim > 2
        and not is_state(node)
    ]


def _position_use(start: Node) -> Node | None:
    """The first node that indexes a value derived from ``start`` by one that is not."""
    derived = {start}
    for node in start.graph.nodes:
        if derived.intersection(node.all_input_nodes):
            derived.add(node)
    return next((node for node in start.graph.nodes if _indexes(node, derived)), None)


def _indexes(node: Node, derived: set[Node]) -> bool:
    if node.target in _INDEXES or (node.op == "call_method" and node.target in _METHODS):
        given = [n for n in node.all_input_nodes if n not in derived]
        return bool(given) and node.all_input_nodes[0] in derived
    if node.target is not operator.getitem or not isinstance(of := node.args[0], Node):
        return False
    value, index = of.meta.get("example_value"), node.args[1]
    if of not in derived:
        return False
    if not isinstance(value, Tensor):
        return False
    parts = index if isinstance(index, tuple) else (index,)
    token_axis = min(1, value.ndim - 2)  # [B, S, ...], or rows [B * S, D]
    at = parts if Ellipsis in parts else parts[token_axis : token_axis + 1]
    return any(_is_position(part, derived, value.shape[token_axis]) for part in at)


def _is_position(part: Any, derived: set[Node], length: int | torch.SymInt) -> bool:
    if isinstance(part, slice):
        return any(_is_bound(bound, length) for bound in (part.start, part.stop))
    if isinstance(part, Node):
        value = part.meta.get("example_value")
        return part not in derived and not (isinstance(value, Tensor) and value.dtype == torch.bool)
    # The first token stays first, and tokens counted from the end keep their index.
    return isinstance(part, int) and part > 0


def _is_bound(bound: Any, length: int | torch.SymInt) -> bool:
    """Whether a slice bound lies between tokens and is not derived from the sequence's length."""
    if isinstance(bound, Node):
        value = bound.meta.get("example_value")
        own = length.node.expr.free_symbols if isinstance(length, torch.SymInt) else set()
        return isinstance(value, torch.SymInt) and not value.node.expr.free_symbols <= own
    if not isinstance(bound, int) or depends_on_data(length):
        return False
    return 1 < bound < hint(length)  # one past the first token is the same in both sequences


class TakesShortened:
    """Runs a later graph: refuses shortened inputs that it indexes by position, marks outputs."""

    def __init__(self, compiled: Callable[..., Any], graph: Graph) -> None:
        self._compiled, self._uses = compiled, uses_of_positions(graph)
        self._floats = [index for index, _ in _may_be_shortened(graph)]

    def __call__(self, *args: Any) -> Any:
        marks = {index: getattr(args[index], _KEPT, None) for index in self._floats}
        kept = {index: keep_idx for index, keep_idx in marks.items() if keep_idx is not None}
        for index in kept:
            if index in self._uses:
                raise PositionsAfterCut(
                    "a later graph of the call takes tokens by their positions in the prompt out "
                    f"of the shortened sequence, at: {self._uses[index]}"
                )
        outputs = self._compiled(*args)
        if kept and isinstance(outputs, tuple | list):
            mark(outputs, next(iter(kept.values())))
        return outputs


_SHORT = "_dartfx_short_cache"


class ShortCaches:
    """A graph of a bare ``torch.compile``, whose KV caches do not count dropped tokens.

    All layers of the caches are as long as the pruned prompt, so positions of later tokens come out
    too low unless the caller passes them.  A call without positions is refused, and so is one with
    several tokens, of which transformers keeps those it takes to be new.  reports: this graph's.
    """

    def __init__(self, compiled: Callable[..., Any], graph: Graph, reports: Sequence[Any]) -> None:
        self._compiled, self._reports = compiled, reports
        inputs = enumerate(graph.find_nodes(op="placeholder"))
        values = [(index, n.meta.get("example_value")) for index, n in inputs if not is_state(n)]
        given = [(index, value) for index, value in values if isinstance(value, Tensor)]
        self._caches = [index for index, value in given if _is_cache(value)]
        self._integers = [index for index, value in given if value.dtype == torch.int64]

    def __call__(self, *args: Any) -> Any:
        short = any(getattr(args[index], _SHORT, False) for index in self._caches)
        # Token ids and positions of a single token.
        if short and sum(args[index].shape[-1:] == (1,) for index in self._integers) < 2:
            raise SelectionError(
                "a bare torch.compile cannot let a KV cache know that pruning dropped tokens of "
                "its prompt, and the call brings several tokens, or one without position_ids; "
                "use dartfx.compile(model)"
            )
        outputs = self._compiled(*args)
        layouts = (getattr(made.outcome, "kv_layout", "") for made in self._reports)
        if isinstance(outputs, tuple | list) and (short or "uniform" in layouts):
            for output in filter(_is_cache, outputs):
                setattr(output, _SHORT, True)
        return outputs


def _is_cache(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
