"""``dartfx.explain``: what the backend would do with one call, without compiling it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dartfx import compat
from dartfx.backend.graph_compiler import compile_graph, prepare_dynamo
from dartfx.config.options import DartConfig
from dartfx.model.compiled_model import CompiledModel
from dartfx.model.history import kept_tokens
from dartfx.model.target import model_of, replaced_call
from dartfx.observe import report
from dartfx.observe.kept import note_views
from dartfx.observe.next_step import next_step
from dartfx.observe.report import Report
from dartfx.passes.outcome import Outcome, Unchanged
from dartfx.token_map.infer_layout import LayoutUnknown
from dartfx.token_map.kept_tokens import KeptTokens

__all__ = ["Explanation", "explain"]

Call = Callable[..., Any]


@dataclass(frozen=True)
class Explanation:
    """What the backend would do with each graph of one call; prints as text.

    tokens: which vision tokens the call kept, per image, if requested.  notes: what the way of
    calling changes.
    """

    reports: tuple[Report, ...]
    tokens: tuple[KeptTokens, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> bool:
        """Whether any graph would be pruned."""
        return any(r.pruned for r in self.reports)

    def __str__(self) -> str:
        shown = [r for r in self.reports if _concerns_vision_tokens(r.outcome)]
        hidden = len(self.reports) - len(shown)
        lines = [str(r) for r in shown]
        if hidden:
            lines.append(f"{hidden} other graphs: no vision tokens enter a decoder there")
        if not self.reports:
            lines.append("dynamo made no graph of this call, so nothing can be pruned")
        elif not shown:
            lines.append("nothing to prune: this call carries no vision tokens")
        lines += [*map(str, self.tokens), *self.notes]
        return "\n".join(lines if self.pruned else [*lines, next_step(self.reports)])


def _concerns_vision_tokens(outcome: Outcome) -> bool:
    """Whether a graph holds vision tokens, or may hold some."""
    if isinstance(outcome, Unchanged):
        return outcome.all_retained or outcome.unsure
    return True


def explain(
    target: nn.Module | Call,
    *args: Any,
    options: Mapping[str, object] | None = None,
    tokens: bool = False,
    **kwargs: Any,
) -> Explanation:
    """What would be pruned, and why or why not, for one call; compiles nothing.

    target: a model, or its bound ``generate``; it is called with args and kwargs, its graphs run
    eagerly.  options: as in ``torch.compile``; default: those the model was compiled with by
    :func:`dartfx.compile`, else the defaults.  tokens: also show which vision tokens are kept, and
    their cells in the image if kwargs give its size (:mod:`dartfx.token_map.infer_layout`).
    Raises what the call raises; TypeError when target belongs to no module.
    """
    target, model = model_of(target, "dartfx.explain")
    current = model._compiled_call_impl
    with report.isolate_reports() as reports, _many_compilations():
        call = _explaining_call(model, options, tokens)
        with torch.no_grad(), replaced_call(model, call):
            target(*args, **kwargs)
    pruned = any(made.pruned for made in reports)
    shown, notes = _kept_tokens_of_call(kwargs) if tokens and pruned else ((), [])
    if (directory := call.config.dump) is not None:
        note_views(Path(directory), ((k.row, k.views()) for k in shown))
    if current is None and _is_bypassed(model, target):
        notes.append(_BYPASSED)
    return Explanation(tuple(reports), shown, tuple(notes))


def _explaining_call(
    model: nn.Module, options: Mapping[str, object] | None, tokens: bool
) -> CompiledModel:
    """The model's call with its graphs pruned but not lowered, compiled as ``model`` is."""
    current = model._compiled_call_impl
    if options is None and isinstance(current, CompiledModel):
        config = current.config
    else:
        config = DartConfig.of_call(options)
    config = dataclasses.replace(
        config, lowering="eager", inductor={}, mode=None, on_unsupported="ignore", tokens=tokens
    )
    if isinstance(current, CompiledModel):
        return CompiledModel.of(model, config)
    prepare_dynamo()
    call = torch.compile(model._call_impl, backend=partial(compile_graph, config))
    return CompiledModel(model, call, call, config)


def _kept_tokens_of_call(arguments: Mapping[str, Any]) -> tuple[tuple[KeptTokens, ...], list[str]]:
    """The kept tokens with the layout that the call's arguments give; a note if they give none."""
    try:
        return tuple(kept_tokens(arguments)), []
    except LayoutUnknown:
        return tuple(kept_tokens()), []
    except ValueError as error:
        # A square number of tokens may still be tiles: better no layout than a wrong one.
        without = (dataclasses.replace(k, layout=None) for k in kept_tokens())
        return tuple(without), [f"NOTE: {error}"]


_BYPASSED = (
    "NOTE: torch.compile(model) returned a wrapper of this model; any method of that wrapper but "
    "a call, generate too, runs the original model, uncompiled. Compile in place: "
    "dartfx.compile(model), or model.compile(backend='dart')"
)


def _is_bypassed(model: nn.Module, target: object) -> bool:
    """Whether target is a method of a model that is compiled only by a wrapper around it."""
    if target is model or (wrapper := compat.find("OptimizedModule")) is None:
        return False
    return any(
        type(candidate) is wrapper and candidate._orig_mod is model
        for candidate in gc.get_objects()
    )


@contextmanager
def _many_compilations() -> Iterator[None]:
    # Each explanation compiles the same code again; that is no storm of recompilations.
    with compat.dynamo_config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield
