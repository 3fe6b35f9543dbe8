"""``dartfx.verify``: checks the rewriting of a user's own model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from dartfx import compat
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError, UnsupportedGraphError
from dartfx.model.target import model_of, replaced_call
from dartfx.passes.analysis.prefilter import may_merge_features
from dartfx.passes.outcome import Outcome, Pruned, Unchanged
from dartfx.passes.refusal import Declined, Refusal
from dartfx.verification.compare import Graphs, NotPruned

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
        layers = ", ".join(str(cut.layer) for cut in pruned.cuts)
        lines = [
            f"{pruned.sequence[0]} -> {pruned.sequence[1]} tokens before layer {layers}: "
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
    target, owner = model_of(target, "dartfx.verify")
    config = DartConfig.from_options(options)
    if config.merge != "none":
        raise ConfigError(
            f"merge={config.merge!r}: dartfx.verify compares with the original in which attention "
            "hides the dropped tokens, and merged ones are not hidden; verify with merge='none'"
        )
    backend = _Backend(config, tolerance)
    call = torch.compile(owner._call_impl, backend=backend, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad(), replaced_call(owner, call):
            target(*args, **kwargs)
    except compat.errors("TorchDynamoException") as error:
        advice = "dartfx.verify(model.generate, ...), which computes image features outside of it"
        raise UnsupportedGraphError(
            f"dynamo does not hold this call in one graph: {str(error).splitlines()[0]}",
            advice=advice if target is owner else "",
        ) from error
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
        if not may_merge_features(module.graph):
            return module.forward
        try:
            graphs = Graphs(module, self._config)
        except Refusal as refusal:
            self._outcomes.append(refusal.declined)
            return module.forward
        except NotPruned as instead:
            self._outcomes.append(instead.outcome)
            return module.forward

        def run(*args: Any) -> Any:
            outputs = module.forward(*args)
            found = graphs.compare(outputs, args)
            given = self._tolerance
            self._found.append(
                Verification(
                    found.exact,
                    found.inexact,
                    found.layers,
                    found.outputs,
                    TOLERANCE[found.dtype] if given is None else given,
                    graphs.outcome,
                )
            )
            return outputs

        return run

    def result(self) -> Verification:
        """The verification of the call.  Raises UnsupportedGraphError without one."""
        if self._found:
            return self._found[0]
        for outcome in self._outcomes:
            if isinstance(outcome, Declined):
                raise UnsupportedGraphError(outcome.because, outcome.where, outcome.advice)
            if isinstance(outcome, Unchanged):
                raise UnsupportedGraphError(outcome.because)
        raise UnsupportedGraphError(
            "no vision tokens enter a decoder in this call, so there is nothing to verify"
        )
