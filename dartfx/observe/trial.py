"""Runs a rebuilt graph, pruned and unpruned, on random inputs of the recorded form."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from dartfx.observe.fitting import sized
from dartfx.observe.random_inputs import RandomInputs
from dartfx.observe.repro_script import Arrival
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.graph import source_line
from dartfx.passes.refusal import Refusal
from dartfx.runtime import vision_mask

__all__ = ["Trial", "arriving"]

# What integers may be that nothing in the graph says anything about; see RandomInputs.draw.
_UNKNOWN = ("count", "one", "zero")


class _Misfit(Exception):
    """The graph as dynamo gave it does not take the values that were drawn."""


class Trial:
    """One rebuilt graph and the form of its inputs.

    module: dynamo's graph; examples: its fake inputs; arrival: how a vision mask came to it.
    """

    def __init__(
        self, module: GraphModule, examples: Sequence[Any], arrival: Arrival | None, seed: int
    ) -> None:
        self._module, self._examples = module, examples
        self._arrival, self._seed = arrival, seed

    def lines(
        self, compiled: Callable[..., Any] | None, pruned: bool, run: bool | None
    ) -> Iterator[str]:
        """Runs the graph, and what came of it; a line for each thing.

        compiled: what the backend made of it, if anything; pruned: whether that is pruned.  Raises
        what the pruned graph raises on inputs that the unpruned one takes.
        """
        size = sum(_bytes(e) for e in self._examples)
        if run is False:
            return
        if run is None and 2 * size > _memory():
            yield (
                f"not run: its inputs take {size / 1e9:.1f} GB, more than half of this machine's "
                f"memory ({_memory() / 1e9:.1f} GB); --run runs it all the same"
            )
            return
        try:
            inputs = RandomInputs(normalise(self._module), self._examples)
        except Refusal as refusal:
            yield f"not run: {refusal.declined.because}"
            return
        try:
            values, outputs = self._unpruned(inputs)
        except _Misfit as misfit:
            # torch adds its own account of where, in lines of its own.
            yield f"no values were found that this graph accepts: {_first_line(misfit)}"
            yield from _marks(inputs, inputs.draw(self._seed))
            return
        yield f"random inputs (seed {self._seed}): {len(values)}, {size / 1e6:,.1f} MB"
        yield from _marks(inputs, values)
        yield f"unpruned, it runs:  {_shown(outputs)}"
        if compiled is None or not pruned:
            return
        try:
            made = self._pruned(compiled, values)
        except Exception as error:  # what it raises is the finding, unless the values are to blame
            if all(marked == demand.rows for demand, marked in inputs.met(values)):
                raise
            yield f"pruned, it refuses these values: {_first_line(error)}"
            return
        yield f"pruned, it runs:    {_shown(made)}"

    def _unpruned(self, inputs: RandomInputs) -> tuple[list[Any], Any]:
        """Values that the graph takes, the first whose outputs are numbers; and its outputs."""
        taken: list[tuple[list[Any], Any]] = []
        failures: list[_Misfit] = []
        for unknown in _UNKNOWN:
            values = inputs.draw(self._seed, unknown)
            try:
                taken.append((values, _Watched(self._module).run(*_copies(values))))
            except _Misfit as misfit:
                failures.append(misfit)
                continue
            if _finite(taken[-1][1]):
                return taken[-1]
        if not taken:
            raise failures[0]
        return taken[0]

    def _pruned(self, compiled: Callable[..., Any], values: list[Any]) -> Any:
        own = _copies(values)
        with torch.no_grad(), arriving(self._arrival, own):
            return compiled(*own)


class _Watched(Interpreter):
    """Runs a graph and says at which line of the model it stopped."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:  # any operator may refuse a value, each in its own way
            told = f"{n.name} ({source_line(n)}) says: {_first_line(error)}"
            raise _Misfit(told) from error


@contextlib.contextmanager
def arriving(arrival: Arrival | None, inputs: Sequence[Any]) -> Iterator[None]:
    """Let a mask arrive with one of the inputs, fake or real, as in the recorded call."""
    if arrival is None:
        yield
        return
    place, rows, is_given = arrival
    like = inputs[place]
    if is_given:
        shape = sized(like.shape[:2])
        with vision_mask.vision_tokens(_marked(torch.zeros(shape, dtype=torch.bool), rows)):
            yield
        return
    if isinstance(like, torch._subclasses.FakeTensor):
        with like.fake_mode:
            mask = torch.empty(like.shape[:2], dtype=torch.bool, device=like.device)
    else:
        mask = _marked(torch.zeros(like.shape[:2], dtype=torch.bool), rows).to(like.device)
    vision_mask.record(like, mask, rows)
    yield


def _marked(mask: Tensor, rows: int) -> Tensor:
    """So many True in a mask [B, S], an equal share in each row, where there is room after text."""
    share, more = divmod(rows, mask.shape[0])
    start = 1 if share + 2 <= mask.shape[1] else 0
    for i, row in enumerate(mask):
        row[start : start + share + (i < more)] = True
    return mask


def _marks(inputs: RandomInputs, values: Sequence[Any]) -> Iterator[str]:
    """A line for each mask that rows are written by; whether it marks as many positions."""
    for demand, marked in inputs.met(values):
        fits = (
            "" if marked == demand.rows else ": these values do NOT fit, so what follows may fail"
        )
        yield f"mask {demand.mask.name}: {marked} positions for {demand.rows} rows{fits}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _bytes(example: Any) -> int:
    if not isinstance(example, Tensor):
        return 0
    return prod(sized(example.shape)) * example.element_size()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _copies(values: Sequence[Any]) -> list[Any]:
    """The same values in tensors that a graph may write to."""
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _finite(outputs: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(outputs))


def _shown(outputs: Any) -> str:
    """Dtype and shape of all outputs, equal ones counted."""
    forms = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in _tensors(outputs)]
    shown = [f"{n} x {form}" if n > 1 else form for form, n in Counter(forms).items()]
    return ", ".join(shown) + ("" if _finite(outputs) else "; NOT all finite")
