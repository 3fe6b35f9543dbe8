"""What dynamo does for people who read its logs, and need not do in the tests.

None of it changes a graph, a guard or a report.
"""

from __future__ import annotations

import traceback
from contextvars import ContextVar
from typing import Any

import torch
import torch._dynamo.guards
from torch.utils import _config_module


def cut_costs() -> None:
    """For the whole process."""
    # Its telemetry times the guards of each frame, after it has written 256 MB so that no
    # processor's cache is warm: 20 ms of CPU, a tenth of what a model that breaks into 50 graphs
    # takes.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

    # Pytest gives a handler to every logger that does not propagate.  With one on this, torch
    # writes each graph and each guard as text, as for TORCH_TRACE: a twentieth of a compilation.
    # The same for the stacks of what a frame mutates, a fiftieth.
    torch._logging._internal.trace_log.propagate = True
    torch._dynamo.config.side_effect_replay_policy = "silent"

    # Each guard's code with the line that needs it, for logs of guards and of recompilations.
    torch._dynamo.guards.get_verbose_code_part = lambda code, _: code

    # Every node knows its stack as text, and most of them share most of its lines.
    traceback.StackSummary.format_frame_summary = _formatted  # type: ignore[method-assign]

    # Two options are read for every bytecode, slowly since they may differ between contexts (not in
    # torch 2.11).
    if isinstance(torch._dynamo.config._config["verbose"].user_override, ContextVar):
        _config_module.ConfigModule.__getattr__ = _read  # type: ignore[method-assign]


_format = traceback.StackSummary.format_frame_summary
_frames: dict[tuple[Any, ...], str] = {}


def _formatted(stack: traceback.StackSummary, frame: traceback.FrameSummary) -> str:
    where = (frame.filename, frame.lineno, frame.end_lineno, frame.colno, frame.end_colno)
    key = (*where, frame.name, frame.line)
    if frame.locals:
        return _format(stack, frame)
    if key not in _frames:
        _frames[key] = _format(stack, frame)
    return _frames[key]


_slowly = _config_module.ConfigModule.__getattr__
_UNSET = _config_module._UNSET_SENTINEL
_plain: dict[Any, bool] = {}


def _read(config: Any, name: str) -> Any:
    """An option that has no alias, no variable of the environment and no default to be copied."""
    entry = config._config.get(name)
    if entry is None or entry.hide:
        return _slowly(config, name)
    if (plain := _plain.get(id(entry))) is None:
        set_elsewhere = (entry.env_value_force, entry.env_value_default)
        plain = _plain[id(entry)] = (
            not (entry.alias or entry.deprecated or entry.justknob)
            and all(value is _UNSET for value in set_elsewhere)
            and isinstance(entry.default, (bool, int, str, type(None)))
        )
    if not plain:
        return _slowly(config, name)
    value = entry.user_override.get()
    return entry.default if value is _UNSET else value
