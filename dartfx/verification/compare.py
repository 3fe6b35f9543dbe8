"""Compares a rewritten graph with its original: unpruned, and with the dropped tokens hidden."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dartfx.backend.request import CallerCapabilities, request_of
from dartfx.backend.rewrite import rewrite
from dartfx.config.options import DartConfig
from dartfx.passes.analysis import locate
from dartfx.passes.analysis.kv_caches import sliding_caches
from dartfx.passes.analysis.token_axes import TokenAxes, infer_axes
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.graph import argument
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Request
from dartfx.passes.site import Site
from dartfx.verification.masked_reference import (
    Watched,
    hiding,
    layer_values,
    take,
    watched,
    watched_tail,
)

__all__ = ["Compared", "Graphs", "NotPruned"]

_SELECT = torch.ops.dartfx.select_tokens.default


class Compared(NamedTuple):
    """exact, inexact: the outputs with all tokens retained; layers, outputs: differences by layer
    and by output's place, relative to the largest value; dtype: of the hidden states."""

    exact: bool
    inexact: float
    layers: dict[int, float]
    outputs: dict[int, float]
    dtype: torch.dtype


class NotPruned(Exception):
    """The graph's outcome instead; None where it holds no decoder."""

    def __init__(self, outcome: Outcome | None) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Graphs:
    """The rewritten graphs with R and with all tokens, and the masked original.

    Raises NotPruned, and Refusal where the graph cannot even be traced or has no such reference.
    """

    def __init__(self, module: GraphModule, config: DartConfig) -> None:
        request = request_of(config, CallerCapabilities(fixes_sliding_lengths=True))
        self.outcome, self.pruned = _pruned(module, request)
        if self.outcome.order_mixing is not None:
            raise Refusal(
                f"{self.outcome.order_mixing}, and the reference hides tokens from attention only",
                advice="the same model with attention only, or an eager model pruned by hooks",
            )
        everything = [dataclasses.replace(s, retain=lambda n: n) for s in request.stages]
        unshortened = dataclasses.replace(request, stages=tuple(everything), always=True)
        _, self.whole = _pruned(module, unshortened)
        original = normalise(module)
        sites = _sites(original, self.outcome)
        axes = TokenAxes(infer_axes(original.graph), sites[0])
        self.masked = hiding(original, sites, axes)
        self._watch = {i: watched(n, axes) for i, n in layer_values(sites[0], axes).items()}
        self._returned = _returned(original, sites, axes)
        layers = [w.name for w in self._watch.values()]
        _return(self.masked, [*(w.name if w else None for w in self._returned), *layers])
        _return_also(self.pruned, layers)
        selects = self.pruned.graph.find_nodes(op="call_function", target=_SELECT)
        valid = argument(selects[0], "valid_mask")
        self._valid = [] if valid is None else [valid.name]
        self._cuts = len(selects)
        _return_also(self.pruned, [*self._valid, *(n.name for n in selects)])

    def compare(self, outputs: Sequence[Any], args: Sequence[Any]) -> Compared:
        """Run all graphs on these inputs and compare.  outputs: the original's own."""
        whole = self.whole(*args)
        pairs = [(a, b) for a, b in zip(outputs, whole, strict=True) if isinstance(a, Tensor)]
        exact = all(torch.equal(a, b) for a, b in pairs)
        inexact = max((_difference(a, b) for a, b in pairs), default=0.0)
        count, layers = len(outputs), list(self._watch)
        pruned = list(self.pruned(*args))
        keeps = [pruned.pop() for _ in range(self._cuts)][::-1]
        # Of each cut in the prompt's positions.
        keeps = list(itertools.accumulate(keeps, lambda one, later: one.gather(1, later)))
        valid = pruned.pop() if self._valid else None
        masked = self.masked(*keeps, *args)
        where = [*self._returned, *self._watch.values()]
        length = masked[count].shape[1]
        found = {
            output: _apart(a, b, keeps, value, valid, length)
            for output, (a, b, value) in enumerate(zip(masked, pruned, where, strict=True))
            if value is not None and isinstance(a, Tensor) and a.is_floating_point()
        }
        return Compared(
            exact,
            inexact,
            {layer: found[count + i] for i, layer in enumerate(layers)},
            {output: d for output, d in found.items() if output < count},
            pruned[count].dtype,
        )


def _pruned(module: GraphModule, request: Request) -> tuple[Pruned, GraphModule]:
    outcome, rewritten, _ = rewrite(lambda: normalise(module), module, request)
    if isinstance(outcome, Pruned):
        return outcome, rewritten
    raise NotPruned(outcome)


def _sites(original: GraphModule, outcome: Pruned) -> list[Site]:
    """Where the graph was cut, in a copy of it that was not."""
    found = locate.find_vision(original.graph, locate.find_stacks(original.graph))
    assert found is not None
    return [locate.locate(cut.layer, *found) for cut in outcome.cuts]


def _returned(
    original: GraphModule, sites: Sequence[Site], axes: TokenAxes
) -> list[Watched | None]:
    """What the graph returns, as something to compare."""
    (output,) = original.graph.find_nodes(op="output")
    tails = sliding_caches(sites[0], output.all_input_nodes, axes)
    return [
        None if not isinstance(n, Node)
        else watched_tail(n, sites, axes) if n in tails
        else watched(n, axes)
        for n in output.args[0]
    ]  # fmt: skip


def _return(module: GraphModule, names: Sequence[str | None]) -> None:
    """Make the graph return exactly these values."""
    nodes = {n.name: n for n in module.graph.nodes}
    (output,) = module.graph.find_nodes(op="output")
    output.args = (tuple(nodes[name] if name else None for name in names),)
    module.recompile()


def _return_also(module: GraphModule, names: Sequence[str]) -> None:
    """Append these values to what the graph returns."""
    nodes = {n.name: n for n in module.graph.nodes}
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *(nodes[name] for name in names)),)
    module.recompile()


def _apart(
    masked: Tensor,
    pruned: Tensor,
    keeps: Sequence[Tensor],
    where: Watched,
    valid: Tensor | None,
    length: int,
) -> float:
    """The largest difference at kept tokens over the largest value there; pads do not count."""
    # A tail may be returned whole instead, where pruning left less than a window of tokens.
    is_tail = where.tail > 0 and pruned.shape[2] == where.tail
    keep = keeps[where.cuts - 1] if is_tail and where.cuts else None
    if masked.shape != pruned.shape and not is_tail:
        keep = next(k for k in keeps if take(masked, k, where, length).shape == pruned.shape)
    if keep is not None:
        masked = take(masked, keep, where, length)
    if is_tail:
        masked = masked[:, :, -where.tail :]
    if keep is not None and valid is not None and len(where.dims) == 1 and where.batch is not None:
        seen = valid.expand(keep.shape[0], -1).gather(1, keep)
        shape = [1] * masked.ndim
        if masked.shape[where.dims[0]] == keep.shape[1]:
            shape[where.batch], shape[where.dims[0]] = keep.shape
            masked, pruned = (t.where(seen.view(shape), 0) for t in (masked, pruned))
    return _difference(masked, pruned) / max(float(pruned.abs().max()), 1e-30)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
