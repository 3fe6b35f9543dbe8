"""``dartfx.verify``: whether the rewriting of a user's own model means what it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx import GraphModule, Node

from dartfx.backend import Host, request_of
from dartfx.config import DartConfig
from dartfx.errors import UnsupportedGraphError
from dartfx.masked import Watched, hiding, layer_values, take, watched, watched_tail
from dartfx.passes import cache
from dartfx.passes.axes import Axes, TokenAxes
from dartfx.passes.facts import Declined, Outcome, Pruned, Refusal, Site, Untouched
from dartfx.passes.normalise import normalise
from dartfx.passes.pipeline import prune
from dartfx.passes.screen import writes_rows

__all__ = ["Verification", "verify"]

Call = Callable[..., Any]

# Largest difference over the largest value that rounding explains, by the values' dtype: the
# masked graph sums zeros where the pruned one sums nothing, so kernels add in another order.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; prints as text.

    exact: whether retaining all N tokens gave the original's outputs bit for bit; inexact: the
    largest difference of any output there.  layers: for each decoder layer the largest difference
    between pruned and masked hidden states at kept tokens, over their largest value; outputs: the
    same for each output.  tolerance: what rounding explains.  outcome: what was pruned.
    """

    exact: bool
    inexact: float
    layers: dict[int, float]
    outputs: dict[int, float]
    tolerance: float
    outcome: Pruned = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether both checks hold."""
        differences = [*self.layers.values(), *self.outputs.values()]
        return self.exact and all(d <= self.tolerance for d in differences)

    def __str__(self) -> str:
        pruned = self.outcome
        lines = [
            f"{pruned.sequence[0]} -> {pruned.sequence[1]} tokens before layer {pruned.layer}: "
            f"{'verified' if self.ok else 'NOT VERIFIED'}",
            "  all tokens retained: "
            + (
                "equal to the original, bit for bit" if self.exact else f"off by {self.inexact:.1e}"
            ),
            f"  {pruned.retained} of {pruned.vision_tokens} retained, against masking in the "
            f"original (relative, up to {self.tolerance:.0e} is rounding):",
        ]
        lines += [f"    after layer {i}: {d:.1e}" for i, d in self.layers.items()]
        lines += [f"    largest of {len(self.outputs)} outputs: {max(self.outputs.values()):.1e}"]
        return "\n".join(lines)


def verify(
    target: nn.Module | Call,
    *args: Any,
    options: Mapping[str, object] | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> Verification:
    """Check on one call that the model's rewritten graph computes what it should.

    target: a model, or its bound ``generate``; it is called with args and kwargs and not changed.
    options: as in ``torch.compile``.  Two checks: with every token retained, the rewritten graph
    must give the original's outputs bit for bit; with the options' R, hidden states of every layer
    and all outputs must equal, at kept tokens, those of the original graph in which attention hides
    the dropped tokens from the cut on.  tolerance: of the second, relative to the largest value;
    default: by dtype, 1e-4 for float32.

    Graphs run eagerly; Inductor's code is not part of it.  Raises UnsupportedGraphError when the
    call is not pruned, or is not one graph; TypeError when target belongs to no module.
    """
    if isinstance(target, nn.Module):
        target = getattr(target, "_orig_mod", target)
    owner = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    if not isinstance(owner, nn.Module):
        raise TypeError("dartfx.verify needs a model or a method of one, such as model.generate")
    backend = _Backend(DartConfig.from_options(options), tolerance)
    current = owner._compiled_call_impl
    owner._compiled_call_impl = torch.compile(
        owner._call_impl, backend=backend, fullgraph=True, dynamic=False
    )
    try:
        with torch.no_grad():
            target(*args, **kwargs)
    except TorchDynamoException as error:
        advice = "dartfx.verify(model.generate, ...), which computes image features outside of it"
        raise UnsupportedGraphError(
            f"dynamo does not hold this call in one graph: {str(error).splitlines()[0]}",
            advice=advice if target is owner else "",
        ) from error
    finally:
        owner._compiled_call_impl = current
    return backend.result()


class _Backend:
    """Runs every graph as it is, and the one with vision tokens in three other ways as well."""

    def __init__(self, config: DartConfig, tolerance: float | None) -> None:
        self._config = dataclasses.replace(
            config, lowering="eager", inductor={}, mode=None, on_unsupported="ignore"
        )
        self._tolerance = tolerance
        self._found: list[Verification] = []
        self._outcomes: list[Outcome | None] = []

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Call:
        if not writes_rows(module.graph):
            return module.forward
        try:
            graphs = _Graphs(module, self._config)
        except Refusal as refusal:
            self._outcomes.append(refusal.declined)
            return module.forward
        except _NotPruned as instead:
            self._outcomes.append(instead.outcome)
            return module.forward

        def run(*args: Any) -> Any:
            outputs = module.forward(*args)
            self._found.append(graphs.compare(outputs, args, self._tolerance))
            return outputs

        return run

    def result(self) -> Verification:
        """The verification of the call.  Raises UnsupportedGraphError without one."""
        if self._found:
            return self._found[0]
        for outcome in self._outcomes:
            if isinstance(outcome, Declined):
                raise UnsupportedGraphError(outcome.because, outcome.where, outcome.advice)
            if isinstance(outcome, Untouched):
                raise UnsupportedGraphError(outcome.because)
        raise UnsupportedGraphError(
            "no vision tokens enter a decoder in this call, so there is nothing to verify"
        )


class _NotPruned(Exception):
    """What became of the graph instead; None where no decoder is in it."""

    def __init__(self, outcome: Outcome | None) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _Graphs:
    """The rewritten graphs with R and with all tokens, and the masked original.

    Raises _NotPruned, and Refusal where the graph cannot even be traced.
    """

    def __init__(self, module: GraphModule, config: DartConfig) -> None:
        request = request_of(config, Host(recounts=True))
        self._watch: dict[int, Watched] = {}
        self._returned: list[Watched | None] = []
        self.pruned = normalise(module)
        self.outcome = _pruned(prune(self.pruned, request, observe=self._locate))
        self.whole = normalise(module)
        everything = dataclasses.replace(request, retain=lambda n: n, always=True)
        _pruned(prune(self.whole, everything))
        layers = [w.name for w in self._watch.values()]
        _return(self.masked, [*(w.name if w else None for w in self._returned), *layers])
        _return_also(self.pruned, layers)
        (select,) = self.pruned.graph.find_nodes(op="call_function", target=request.operator)
        valid = [select.args[3]] if isinstance(select.args[3], Node) else []
        _return_also(self.pruned, [n.name for n in (select, *valid)])
        self._has_valid = bool(valid)

    def _locate(self, name: str, module: GraphModule, site: Site | None = None, /) -> None:
        """While the graph is still the original: copy it, and see where its token axis runs."""
        if name != "locate" or site is None:
            return
        axes = TokenAxes(Axes(module.graph), site)
        self.masked = hiding(module, site)
        self._watch = {i: watched(n, axes) for i, n in layer_values(site, axes).items()}
        (output,) = module.graph.find_nodes(op="output")
        tails = cache.tails(site, output, axes)
        self._returned = [
            None if not isinstance(n, Node)
            else watched_tail(n, site, axes) if n in tails
            else watched(n, axes)
            for n in output.args[0]
        ]  # fmt: skip

    def compare(
        self, outputs: Sequence[Any], args: Sequence[Any], tolerance: float | None
    ) -> Verification:
        """Run all graphs on these inputs and compare.  outputs: the original's own."""
        whole = self.whole(*args)
        pairs = [(a, b) for a, b in zip(outputs, whole, strict=True) if isinstance(a, Tensor)]
        exact = all(torch.equal(a, b) for a, b in pairs)
        inexact = max((_difference(a, b) for a, b in pairs), default=0.0)
        count, layers = len(outputs), list(self._watch)
        pruned = list(self.pruned(*args))
        valid = pruned.pop() if self._has_valid else None
        keep = pruned.pop()
        masked = self.masked(keep, *args)
        where = [*self._returned, *self._watch.values()]
        length = masked[count].shape[1]
        found = {
            place: _apart(a, b, keep, value, valid, length)
            for place, (a, b, value) in enumerate(zip(masked, pruned, where, strict=True))
            if value is not None and isinstance(a, Tensor) and a.is_floating_point()
        }
        dtype = pruned[count].dtype
        return Verification(
            exact,
            inexact,
            {layer: found[count + i] for i, layer in enumerate(layers)},
            {place: d for place, d in found.items() if place < count},
            TOLERANCE[dtype] if tolerance is None else tolerance,
            self.outcome,
        )


def _pruned(outcome: Outcome | None) -> Pruned:
    if isinstance(outcome, Pruned):
        return outcome
    raise _NotPruned(outcome)


def _return(module: GraphModule, names: Sequence[str | None]) -> None:
    """Let the graph return these values and nothing else."""
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
    masked: Tensor, pruned: Tensor, keep: Tensor, where: Watched, valid: Tensor | None, length: int
) -> float:
    """The largest difference at kept tokens over the largest value there; pads do not count."""
    # A tail may be returned whole instead, where pruning left less than a window of tokens.
    is_tail = where.tail > 0 and pruned.shape[2] == where.tail
    if masked.shape != pruned.shape and not (is_tail and where.before_cut):
        masked = take(masked, keep, where, length)
    if is_tail:
        masked = masked[:, :, -where.tail :]
    if valid is not None and len(where.dims) == 1 and where.batch is not None:
        seen = valid.expand(keep.shape[0], -1).gather(1, keep)
        shape = [1] * masked.ndim
        if masked.shape[where.dims[0]] == keep.shape[1]:
            shape[where.batch], shape[where.dims[0]] = keep.shape
            masked, pruned = (t.where(seen.view(shape), 0) for t in (masked, pruned))
    return _difference(masked, pruned) / max(float(pruned.abs().max()), 1e-30)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
