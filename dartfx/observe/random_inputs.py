"""Random values that a graph accepts, from the graph alone: what a ``repro.py`` runs on.

Floating values need only the right form. Integers and bools must fit what reads them: rows of a
table, a position, a mask with as many True as there are feature rows. Who reads them says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor
from torch.fx import GraphModule, Interpreter, Node

from dartfx.observe.fitting import Demand, demands, is_integral, reading, sized
from dartfx.passes.graph import hint, is_state, tensor

__all__ = ["RandomInputs"]


class RandomInputs:
    """Values for the inputs of a normalised graph.

    examples: the fake inputs; devices as theirs.
    """

    def __init__(self, module: GraphModule, examples: Sequence[Any]) -> None:
        self._module, self._examples = module, examples
        self._inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._reads = {n: reading(n) for n in self._inputs if is_integral(tensor(n))}
        self.demands = list(demands(module))

    def draw(self, seed: int = 0, unknown: str = "count") -> list[Any]:
        """One value per input: strides, dtypes and devices as the examples'.

        unknown: what integers are that nothing says anything about: "count" (0, 1, .. along the
        last dim, as positions), "one" or "zero".
        """
        generator = Generator().manual_seed(seed)
        drawn = dict(zip(self._inputs, map(_concrete, self._examples), strict=True))
        for node, value in drawn.items():
            if not isinstance(value, Tensor) or value.device.type != "meta":
                continue
            if node in self._reads:
                made = self._integers(node, value, generator, unknown)
            else:
                made = _floats(value, is_state(node), generator)
            drawn[node] = made
        self._place(drawn)
        for node, example in zip(self._inputs, self._examples, strict=True):
            if isinstance(value := drawn[node], Tensor):
                drawn[node] = _like(value, example)
        return [drawn[node] for node in self._inputs]

    def met(self, values: Sequence[Any]) -> list[tuple[Demand, int]]:
        """Every demand, with the number of positions that its mask marks for these values."""
        given = dict(zip(self._inputs, values, strict=True))
        return [
            (d, int(_evaluate(self._module, d.mask, given).sum()) // d.repeated)
            for d in self.demands
        ]

    def _integers(self, node: Node, like: Tensor, generator: Generator, unknown: str) -> Tensor:
        read, shape = self._reads[node], tuple(like.shape)
        if like.dtype == torch.bool or (read.as_mask and read.rows is None):
            return torch.ones(shape, dtype=like.dtype)
        last = shape[-1] if shape else 0
        if read.rows is not None and not is_state(node):
            values = torch.randint(read.rows, shape, generator=generator)
            # What it is compared with marks something; plain text has none of it.
            plain = next((i for i in range(read.rows) if i not in read.compared), 0)
            for marked in read.compared:
                values = torch.where(values == marked, plain, values)
        elif read.compared or unknown == "zero" or not (shape or unknown == "one"):
            values = torch.zeros(shape, dtype=torch.int64)
        elif unknown == "one":
            values = torch.ones(shape, dtype=torch.int64)
        else:
            within = min((n for n in (read.rows, read.places) if n), default=last)
            values = (torch.arange(last) % max(within, 1)).expand(shape)
        return values.to(like.dtype).contiguous()

    def _place(self, drawn: dict[Node, Any]) -> None:
        """Write the marks of every demand that has an input, one after another in each row."""
        after: dict[Node, int] = {}
        written: set[tuple[Node, int | None]] = set()
        for demand in self.demands:
            if demand.source is None or demand.source in written:
                continue
            written.add(demand.source)
            node, mark = demand.source
            value = drawn[node]
            if mark is None:
                value = drawn[node] = torch.zeros_like(value)
            # A mask may have the features' dim, too, as large as theirs or 1.
            own = 2 if mark is None and value.ndim == demand.dims else 1
            rows = value.reshape(-1, *value.shape[-own:])
            share, more = divmod(demand.rows, max(len(rows), 1))
            start = after.get(node, 1 if share + 2 <= rows.shape[1] else 0)
            for i, row in enumerate(rows):
                row[start : start + share + (i < more)] = 1 if mark is None else mark
            after[node] = start + share + 1


def _concrete(example: Any) -> Any:
    """A meta tensor of the example's shape; numbers, also those that tensors stand for, as such."""
    if isinstance(example, torch.SymInt):
        return hint(example)
    if not isinstance(example, Tensor):
        return example
    number = getattr(example, "item_memo", None)
    if isinstance(number, torch.SymFloat | torch.SymInt) and number.node.hint is not None:
        return torch.tensor(number.node.hint, dtype=example.dtype)
    return torch.empty(sized(example.shape), dtype=example.dtype, device="meta")


def _floats(like: Tensor, state: bool, generator: Generator) -> Tensor:
    """Normal values; weights small enough to sum, vectors of state near one: norms, variances."""
    shape = tuple(like.shape)
    real = torch.float64 if like.dtype in (torch.float64, torch.complex128) else torch.float32
    dtype = like.dtype if like.is_complex() else real
    values = torch.randn(shape, generator=generator, dtype=dtype)
    if state and len(shape) > 1:
        values *= max(prod(shape[1:]), 1) ** -0.5
    elif state or not shape:
        values = 1 + 0.1 * values
    return values.to(like.dtype)


def _like(value: Tensor, example: Tensor) -> Tensor:
    """The value with the strides and on the device of the example."""
    shape, strides = sized(example.shape), sized(example.stride())
    own = tuple(1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True))
    made = torch.empty_strided(own, strides, dtype=example.dtype, device=example.device)
    made.copy_(value[tuple(slice(n) for n in own)])
    return made.expand(shape)


def _evaluate(module: GraphModule, wanted: Node, given: dict[Node, Any]) -> Tensor:
    """One value of the graph, computed from the inputs' values and nothing else."""
    needed, ahead = {wanted}, [wanted]
    while ahead:
        new = set(ahead.pop().all_input_nodes) - needed
        needed |= new
        ahead += new
    interpreter = Interpreter(module)
    interpreter.env = dict(given)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node in needed and node not in given:
                interpreter.env[node] = interpreter.run_node(node)
    found: Tensor = interpreter.env[wanted]
    return found
