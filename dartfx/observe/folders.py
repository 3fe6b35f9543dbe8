"""Folders of a dump: one for each graph, and who compiled what is in it.

::

    dumps/index.html                     all graphs, newest first
    dumps/unpruned_calls_4711.json       calls of process 4711 that no pruned graph ran
    dumps/graph_000/compilation.json     which frame, where, when, and why it was compiled again
    dumps/graph_000/report.json, ...
    dumps/graph_000/kept.json            with the option tokens: what the first call kept
    dumps/rank_1/graph_000/...           of a rank, where there are several
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from dartfx import compat
from dartfx.passes.refusal import Declined

__all__ = [
    "COMPILATION",
    "KEPT",
    "UNPRUNED",
    "describe",
    "new_folder",
    "note_unpruned_call",
    "read_json",
    "remove",
    "write",
    "write_json",
]

COMPILATION = "compilation.json"
KEPT = "kept.json"  # of the first call that ran the pruned graph, with the option tokens
UNPRUNED = "unpruned_calls_*.json"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)')
MOST_REASONS = 100  # of one process; each is a line of the index

_LOCK = threading.Lock()
_next: dict[Path, int] = {}
_unpruned: dict[tuple[Path, str], dict[str, Any]] = {}


def new_folder(directory: Path) -> Path:
    """A new ``graph_NNN`` of this process's rank; processes that share a directory share none.

    Numbers go on where the directory ends, and skip those of graphs that were removed, so that the
    same program gives a graph the same name with any filter.
    """
    mine = _of_rank(directory)
    mine.mkdir(parents=True, exist_ok=True)
    with _LOCK:
        if mine not in _next:
            numbers = [int(f.name[6:]) for f in mine.glob("graph_*") if f.name[6:].isdecimal()]
            _next[mine] = max(numbers, default=-1) + 1
        for number in itertools.count(_next[mine]):
            folder = mine / f"graph_{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            _next[mine] = number + 1
            return folder
    raise AssertionError("unreachable")


def remove(folder: Path) -> None:
    """Remove a graph's folder that the filters exclude."""
    shutil.rmtree(folder, ignore_errors=True)


def rank() -> int | None:
    """This process's rank, where there are several."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank() if distributed.get_world_size() > 1 else None


def _of_rank(directory: Path) -> Path:
    return directory if (number := rank()) is None else directory / f"rank_{number}"


def describe(module: GraphModule) -> dict[str, Any]:
    """Facts about a graph when its compilation begins, as plain data.

    frame: dynamo's number of the frame and how often it compiled it before, as "0/1"; where: the
    innermost function that holds all of the graph; recompiled: the guard that failed.
    """
    compile_id = compat.find("CompileContext")
    metrics = compat.find("get_metrics_context")
    # Outside of a compilation the context holds what the last one left.
    noted = metrics() if metrics is not None else None
    compiling = noted is not None and noted.in_progress()
    frame = compile_id.current_compile_id() if compile_id is not None else None
    return {
        "process": os.getpid(),
        "rank": rank(),
        "started": time.time(),
        "frame": None if frame is None else str(frame),
        "where": _where(module),
        "recompiled": getattr(noted, "_metrics", {}).get("recompile_reason") if compiling else None,
    }


def _where(module: GraphModule) -> str:
    """The innermost function that all nodes come from, as ``file:line in function``."""
    traces = [node.meta.get("stack_trace") or "" for node in module.graph.nodes]
    stacks = [found for trace in traces if (found := _FRAME.findall(trace))]
    depth = 0
    for frames in zip(*stacks, strict=False):
        if len({(file, function) for file, _, function in frames}) > 1:
            break
        depth += 1
    return "{}:{} in {}".format(*stacks[0][max(depth, 1) - 1]) if stacks else ""


def note_unpruned_call(directory: str | os.PathLike[str] | None, declined: Declined) -> None:
    """Count a call with vision tokens that ran without any pruned graph, for the index."""
    if directory is None:
        return
    mine = _of_rank(Path(directory))
    with _LOCK:
        known = [reason for where, reason in _unpruned if where == mine]
        reason = str(declined)
        if reason not in known and len(known) >= MOST_REASONS:
            return
        fresh = {"reason": reason, "calls": 0, "first": time.time(), "process": os.getpid()}
        entry = _unpruned.setdefault((mine, reason), fresh)
        entry["calls"] += 1
        entry["last"] = time.time()
        # A server may serve thousands of such calls: the file is written after 1, 2, 4, 8, ...
        if entry["calls"] & (entry["calls"] - 1) == 0:
            mine.mkdir(parents=True, exist_ok=True)
            calls = [made for (where, _), made in _unpruned.items() if where == mine]
            write_json(mine / UNPRUNED.replace("*", str(os.getpid())), calls)


def write(path: Path, content: str | bytes) -> None:
    """Write a file that others may read at any time: the old content or the new, never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """The same for plain data."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The data of a file; None where there is no such file, or another one of its name."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
