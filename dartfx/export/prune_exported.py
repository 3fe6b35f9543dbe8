"""``dartfx.prune_exported``: the same passes on programs of ``torch.export``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from dartfx.backend.request import TORCH_COMPILE, request_of
from dartfx.backend.rewrite import refuse, rewrite
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from dartfx.export.metadata import note_pruning
from dartfx.export.program import finished, require_plain_signature, state_of
from dartfx.observe.dump import ExportDump
from dartfx.observe.report import record
from dartfx.passes.frontend.exported import guards_of, import_exported, refuse_new_guards
from dartfx.passes.internal_error import internal_error
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.refusal import Declined

__all__ = ["prune_exported"]

_NO_MERGE = Declined(
    "no vision tokens enter a decoder in this program: it holds no merge (masked_scatter or "
    "index_put) of vision features into the embeddings of a decoder stack",
    advice="exporting a forward that takes image features or pixels, and holds all decoder layers",
)
_COMPILES = (
    "it says how torch.compile lowers a graph, and an exported program is only rewritten; give "
    "Inductor's options to torch._inductor.aoti_compile_and_package(inductor_configs=...)"
)
_NOT_HERE = {
    "lowering": _COMPILES,
    "inductor": _COMPILES,
    "mode": _COMPILES,
    "quota": "the number of images is read on the host, which a program without dartfx cannot do",
    "min_tokens": "it belongs to quota, which reads the number of images on the host",
    "outline_layers": _COMPILES,
    "check_ranks": "it compares tensor-parallel ranks, and an exported program has none",
}


def prune_exported(program: ExportedProgram, **options: object) -> ExportedProgram:
    """A pruned version of a program of ``torch.export.export``, which is not modified.

    options: those of :class:`DartConfig`, but for ``lowering``, ``inductor`` and ``mode``, which
    say how to compile, and ``kernel="triton"``: the selection becomes plain ATen, so that the
    program can be saved, packaged and run where dartfx is not installed.  ``on_unsupported`` is
    "error" here unless given; "warn" and "ignore" return ``program`` itself where it cannot be
    pruned.  ``tokens``: the program returns (what it returned, keep_idx [B, S'] int64).

    Inputs, parameters and range constraints stay.  Outputs with a token axis shrink to the S' kept
    tokens; :func:`exported_pruning` of the result says which.  Weights are shared.  The result has
    passed torch's verifier and the passes' own check.

    Raises ConfigError for an option that is not valid or does not apply, TypeError for anything
    but an ExportedProgram, UnsupportedGraphError with the reason when the program cannot be pruned,
    which includes one without vision tokens and one with nothing to drop.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            "dartfx.prune_exported needs what torch.export.export returns, got "
            f"{type(program).__name__}"
        )
    config = _config(options)
    exported = _Exported(program, config)
    outcome, pruned = exported.pruned()
    exported.dump.finish(record(len(program.graph.nodes), outcome))
    if pruned is None:
        refuse(config, _declined(outcome))
        return program
    return pruned


def _config(options: Mapping[str, object]) -> DartConfig:
    for name, why in _NOT_HERE.items():
        if name in options:
            raise ConfigError(f"{name} does not apply to dartfx.prune_exported: {why}")
    if options.get("kernel") == "triton":
        raise ConfigError(
            "kernel='triton' does not apply to dartfx.prune_exported: the selection becomes plain "
            "ATen, so that the program runs without dartfx; use kernel='auto' or 'torch'"
        )
    given = {"on_unsupported": "error", **options, "kernel": "torch"}
    return DartConfig.from_options(given)


def _declined(outcome: Outcome) -> Declined:
    """Why there is no pruned program, with advice for exported programs."""
    assert not isinstance(outcome, Pruned)
    if not isinstance(outcome, Declined):
        return Declined(outcome.because)
    if outcome.may_retry_with_graph_breaks:
        return dataclasses.replace(
            outcome, advice="exporting a forward that takes image features, not pixels"
        )
    if any(word in outcome.advice for word in ("compile", "fullgraph")):
        return dataclasses.replace(outcome, advice="exporting the whole decoder in one program")
    return outcome


class _Exported:
    """Runs the passes on one exported program."""

    def __init__(self, program: ExportedProgram, config: DartConfig) -> None:
        self.program, self.config = program, config
        self.dump = ExportDump(config, program.graph_module)

    def pruned(self) -> tuple[Outcome, ExportedProgram | None]:
        """The outcome, and the pruned program where there is one."""
        guards: Any = None

        def trace() -> GraphModule:
            nonlocal guards
            require_plain_signature(self.program)
            module = import_exported(self.program.graph_module, state_of(self.program))
            guards = guards_of(module.graph)
            return module

        request = request_of(self.config, TORCH_COMPILE)
        outcome, module, _ = rewrite(trace, self.program.graph_module, request, observe=self.dump)
        if not isinstance(outcome, Pruned):
            return outcome or _NO_MERGE, None
        try:
            pruned = finished(self.program, module, self.config.tokens)
            refuse_new_guards(module.graph, guards)
        except Exception as error:
            return internal_error("finish", error), None
        note_pruning(pruned, self.program, outcome, self.config)
        return outcome, pruned
