"""The output of ``repro.py`` for its arguments, as lines to print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor
from torch.fx import GraphModule

from dartfx.backend.request import CallerCapabilities
from dartfx.config.options import DartConfig
from dartfx.observe.repro_script import RecordedMask
from dartfx.replay import steps
from dartfx.replay.model_explorer import explorable
from dartfx.replay.profile import NotPruned, measure
from dartfx.replay.run import run_both

__all__ = ["NEEDS_MERGE", "Ran", "passes_lines", "wanted_lines"]

NEEDS_MERGE = "needs a graph that merges the vision tokens itself"


class Ran(NamedTuple):
    """A graph to run: as dynamo made it and pruned (None if it was not), and what it runs on."""

    module: GraphModule
    pruned: Callable[..., Any] | None
    config: DartConfig
    caller: CallerCapabilities
    mask: RecordedMask | None
    recorded: Mapping[str, Tensor]
    seed: int


def wanted_lines(
    ran: Ran, time: str | None, trace: str | None, tolerance: float | None
) -> Iterator[str]:
    """The output of --profile TRACE, --bisect (with its tolerance) or a plain run."""
    if trace is not None:
        return _profile_lines(ran, trace)
    return _run_lines(ran, time) if tolerance is None else _bisect_lines(ran, tolerance)


def _run_lines(ran: Ran, time: str | None) -> Iterator[str]:
    """Both graphs' outputs; with ``time``, how long both take."""
    yield from run_both(ran.module, ran.pruned, ran.recorded, ran.mask, ran.seed)
    if time is not None and ran.pruned is not None:
        yield from steps.timed(
            ran.module, ran.pruned, ran.config, ran.recorded, ran.mask, ran.seed
        )  # fmt: skip


def _bisect_lines(ran: Ran, tolerance: float) -> Iterator[str]:
    """--bisect."""
    _require_merge("--bisect", ran.mask)
    return steps.bisect(ran.module, ran.config, ran.caller, ran.recorded, ran.seed, tolerance)


def _profile_lines(ran: Ran, trace: str) -> Iterator[str]:
    """--profile TRACE."""
    _require_merge("--profile", ran.mask)
    if not (folder := Path(trace).resolve().parent).is_dir():
        _fail(f"argument --profile: there is no folder {str(folder)!r}; make it first")
    try:
        yield str(measure(ran.module, ran.config, ran.caller, ran.recorded, ran.seed, trace))
        yield f"wrote {trace}, for chrome://tracing or ui.perfetto.dev"
    except NotPruned as error:
        yield f"not profiled: {error}"


def passes_lines(ran: Ran, name: str | None, file: str | None) -> Iterator[str]:
    """--pass NAME or --export FILE: for both the passes run, and the graph does not."""
    argument = "--export" if name is None else "--pass"
    _require_merge(argument, ran.mask)
    try:
        if name is not None:
            yield steps.after_pass(ran.module, ran.config, ran.caller, name)
        if file is not None:
            Path(file).write_text(explorable(ran.module, ran.config, ran.caller))
            yield f"wrote {file}, for model-explorer"
    except NotPruned as error:
        yield f"not exported: {error}"
    except (steps.UnknownPass, OSError) as error:
        _fail(f"argument {argument}: {error}")


def _require_merge(argument: str, mask: RecordedMask | None) -> None:
    if mask is not None:
        _fail(f"argument {argument}: it {NEEDS_MERGE}")


def _fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)
