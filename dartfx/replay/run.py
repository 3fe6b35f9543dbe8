"""Runs a rebuilt graph, pruned and unpruned, on the inputs of ``repro_inputs``."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dartfx import compat
from dartfx.observe.repro_inputs import FILE, draw, sized, unrecorded
from dartfx.observe.repro_script import RecordedMask
from dartfx.passes.graph import source_line
from dartfx.runtime import vision_mask

__all__ = ["copies", "mask_present", "reason_not_to_run", "run_both"]


def reason_not_to_run(
    module: GraphModule, recorded: Mapping[str, Tensor], even_if_large: bool
) -> str | None:
    """Why the graph cannot run here, or None: its inputs are too large, or not recorded."""
    examples = [n.meta["example_value"] for n in module.graph.find_nodes(op="placeholder")]
    size = sum(map(_bytes, examples))
    if not even_if_large and 2 * size > _memory():
        return (
            f"not run: its inputs take {size / 1e9:.1f} GB, more than half of this machine's "
            f"memory ({_memory() / 1e9:.1f} GB); use --run to run it all the same"
        )
    if names := unrecorded(module, recorded):
        return (
            f"not run: {FILE}, next to this script, does not hold the graph's integer and bool "
            f"inputs {', '.join(names)} (a dump writes it; token ids of the prompt are in it)"
        )
    return None


def run_both(
    module: GraphModule,
    compiled: Callable[..., Any] | None,
    recorded: Mapping[str, Tensor],
    mask: RecordedMask | None,
    seed: int,
) -> Iterator[str]:
    """Run the graph as dynamo made it, then ``compiled`` if it is given; yield a line for each.

    Raises what the pruned graph raises on inputs that the unpruned one accepts.
    """
    values = draw(module, recorded, seed)
    tensors = [v for v in values if isinstance(v, Tensor)]
    known = sum(n.name in recorded for n in module.graph.find_nodes(op="placeholder"))
    size = sum(t.nbytes for t in tensors)
    yield (
        f"inputs: {known} as recorded, {len(tensors) - known} random (seed {seed}), "
        f"{size / 1e6:,.1f} MB"
    )
    try:
        outputs = _Located(module).run(*copies(values))
    except _Failure as failure:
        # torch appends its own location, in separate lines.
        yield f"unpruned, it fails on random floats: {_first_line(failure)}"
        return
    yield f"unpruned outputs: {_shown(outputs)}"
    if compiled is not None:
        own = copies(values)
        with torch.no_grad(), mask_present(mask, own):
            yield f"pruned outputs:   {_shown(compiled(*own))}"


@contextlib.contextmanager
def mask_present(mask: RecordedMask | None, inputs: Sequence[Any]) -> Iterator[None]:
    """Provide a vision mask for one of the inputs, fake or real, as in the recorded call."""
    if mask is None:
        yield
        return
    like = inputs[mask.input]
    if mask.given:
        shape = sized(like.shape[:2])
        with vision_mask.vision_tokens(_marked(torch.zeros(shape, dtype=torch.bool), mask.rows)):
            yield
        return
    if isinstance(like, compat.FakeTensor):
        with like.fake_mode:
            value = torch.empty(like.shape[:2], dtype=torch.bool, device=like.device)
    else:
        value = _marked(torch.zeros(like.shape[:2], dtype=torch.bool), mask.rows).to(like.device)
    vision_mask.record(like, value, mask.rows)
    yield


def _marked(mask: Tensor, rows: int) -> Tensor:
    """Mark ``rows`` positions of a mask [B, S], an equal share per sample, after one text token."""
    share, more = divmod(rows, mask.shape[0])
    start = 1 if share + 2 <= mask.shape[1] else 0
    for i, row in enumerate(mask):
        row[start : start + share + (i < more)] = True
    return mask


class _Failure(Exception):
    """The graph as dynamo made it does not accept the values."""


class _Located(Interpreter):
    """Runs a graph; where it fails, names the line of the model."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:  # any operator may refuse a value, with any exception
            message = f"{n.name} ({source_line(n)}): {_first_line(error)}"
            raise _Failure(message) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _bytes(example: Any) -> int:
    if not isinstance(example, Tensor):
        return 0
    return prod(sized(example.shape)) * example.element_size()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def copies(values: Sequence[Any]) -> list[Any]:
    """The same values in tensors that a graph may write to."""
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


def _shown(outputs: Any) -> str:
    """Dtype and shape of all outputs, equal ones counted."""
    tensors = [leaf for leaf in compat.pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    forms = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors]
    shown = [f"{n} x {form}" if n > 1 else form for form, n in Counter(forms).items()]
    finite = all(bool(t.isfinite().all()) for t in tensors)
    return ", ".join(shown) + ("" if finite else "; NOT all finite")
