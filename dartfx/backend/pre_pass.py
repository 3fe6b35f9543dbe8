"""``dartfx.as_pre_pass``: pruning as one step of another ``torch.compile`` backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from dartfx.backend.graph_compiler import GraphCompiler
from dartfx.backend.lowering import as_from_dynamo
from dartfx.backend.request import TORCH_COMPILE, request_of
from dartfx.backend.rewrite import rewrite
from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError
from dartfx.passes.analysis.prefilter import may_merge_features
from dartfx.passes.distributed.shards import dtensors, groups
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.outcome import Pruned, ReturnsMask
from dartfx.passes.refusal import Declined
from dartfx.passes.request import Request
from dartfx.passes.selection import ByOperator

__all__ = ["PrePass", "as_pre_pass"]

_COMPILES = "the host backend compiles, not dartfx; pass it to that backend"
_NOT_HERE = {
    "lowering": _COMPILES,
    "inductor": _COMPILES,
    "mode": _COMPILES,
    "outline_layers": _COMPILES,
    "tokens": "kept tokens are recorded around the compiled code, which belongs to the host; "
    'use backend="dart"',
    "check_ranks": 'tensor-parallel graphs are left to backend="dart", whose ranks agree',
}
_SEVERAL_RANKS = Declined(
    "this graph runs on several ranks, which must all prune it or none, and a pass on one graph "
    "cannot consult the others",
    advice='backend="dart"',
)
_WHOLE = 'fullgraph=True, model.generate, or backend="dart", which takes the mask at run time'
_MERGES_FOR_LATER = Declined(
    "vision tokens are merged in this graph and enter the decoder in a later one, and a pass on "
    "one graph cannot forward their mask",
    advice=_WHOLE,
)


def as_pre_pass(options: Mapping[str, object] | None = None) -> PrePass:
    """The passes as a callable on (dynamo's GraphModule, example inputs), returning a GraphModule.

    For custom backends: ``compile_fx(pre_pass(module, inputs), inputs)``.  options: those of
    ``torch.compile(backend="dart", options=...)`` but for ``lowering``, ``inductor`` and ``mode``,
    which are the host's, and ``tokens``.  Raises ConfigError for these and for what is not valid.
    """
    for name, why in _NOT_HERE.items():
        if name in (options or {}):
            raise ConfigError(f"{name} does not apply to dartfx.as_pre_pass: {why}")
    return PrePass(DartConfig.from_options(options))


class PrePass:
    """Returns a pruned graph, or the given one; ``dartfx.reports()`` has the outcome."""

    def __init__(self, config: DartConfig) -> None:
        self.config = config

    def uuid(self) -> str:
        """Identifies the result in the host's cache keys: options, source and versions.

        The selection in a pruned graph contains it as well, so caches that hash the graph need
        nothing more.
        """
        return self.config.fingerprint()

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        """``module`` itself where no vision tokens enter a decoder, else a pruned graph.

        module: dynamo's graph.  The result takes the same inputs.  Where tokens were merged in an
        earlier graph of the call, or are given by :func:`dartfx.vision_tokens`, the mask is known
        only at run time, which a pass does not see: refused according to ``on_unsupported``, as is
        everything that cannot be pruned.  Raises UnsupportedGraphError when that is "error".
        """
        return _Hosted(self.config, module, TORCH_COMPILE).rewritten(inputs)

    def __repr__(self) -> str:
        return f"dartfx.as_pre_pass({self.config})"


class _Hosted(GraphCompiler):
    """One graph on its way through the passes alone."""

    def rewritten(self, inputs: Sequence[Any]) -> GraphModule:
        """The graph to compile."""
        self.dump.save_inputs(inputs)
        if may_merge_features(self.module.graph):
            if groups(self.module.graph) or dtensors(self.module.graph):
                self.announce(_SEVERAL_RANKS)
                return self.module
            outcome, rewritten, _ = rewrite(
                lambda: normalise(self.module),
                self.module,
                _request(self.config),
                observe=self.dump,
                returns_mask=True,
            )
            if outcome is None:
                return self._without_merge(inputs)
            if isinstance(outcome, ReturnsMask):
                outcome = _MERGES_FOR_LATER
            self.announce(outcome)
            as_from_dynamo(rewritten)
            return rewritten if isinstance(outcome, Pruned) else self.module
        return self._without_merge(inputs)

    def _without_merge(self, inputs: Sequence[Any]) -> GraphModule:
        dispatcher = self.dispatcher(_request(self.config))
        if dispatcher.incoming(inputs) is not None:
            declined = Declined(
                "this graph's vision mask comes from outside of it, at run time, which a pass on "
                "one graph does not see",
                advice=_WHOLE,
            )
            self.announce(declined)
        else:
            self.announce(self._no_mask(dispatcher, "no vision tokens enter this graph"))
        return self.module


def _request(config: DartConfig) -> Request:
    """The selector's name in the cut includes the fingerprint: hosts hash nothing but graphs."""
    request = request_of(config, TORCH_COMPILE)
    stages = []
    for stage in request.stages:
        assert isinstance(stage.select, ByOperator)
        *pivots, _, kernel = stage.select.args
        name = f"{config.selector} @ {config.fingerprint()}"
        select = dataclasses.replace(stage.select, args=(*pivots, name, kernel))
        stages.append(dataclasses.replace(stage, select=select))
    return dataclasses.replace(request, stages=tuple(stages))
