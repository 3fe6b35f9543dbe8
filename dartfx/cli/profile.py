"""``python -m dartfx profile``: measured time of each region with its FLOPs and bytes."""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import dartfx
from dartfx.cli.arguments import add_model, load, options
from dartfx.errors import InputError
from dartfx.integrations.hf import quiet_dynamo
from dartfx.integrations.outputs import check_file, check_folder
from dartfx.model.explain import Explanation
from dartfx.observe.dumped import graphs
from dartfx.replay.measured import Profile, add_profile
from dartfx.replay.profile import NotPruned
from dartfx.replay.rebuild import Replay

__all__ = ["configure", "run"]

TRACE = "trace.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "folder", nargs="?", metavar="DUMP", type=Path,
        help="a folder that dump= wrote (its newest pruned graph), or a graph's folder in it; "
        "without it: --model and --image",
    )  # fmt: skip
    add_model(parser, required=False)
    parser.add_argument("--dump", type=Path, help="with --model: keep the dump in this folder")
    parser.add_argument("--trace", type=Path, help="also write the Chrome trace to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 when nothing was pruned.  Raises InputError."""
    check_file("trace", arguments.trace)
    check_folder("dump", arguments.dump)
    if arguments.folder is not None:
        return _profile(_graph(arguments.folder), arguments.trace, keep=True)
    for name in ("model", "image"):
        if getattr(arguments, name) is None:
            raise InputError(name, "name a model and an image, or the folder of a dump")
    with tempfile.TemporaryDirectory() as temporary:
        folder, explanation = _dumped(arguments, arguments.dump or Path(temporary))
        if folder is None:
            print(explanation)
            return 1
        return _profile(folder, arguments.trace, keep=arguments.dump is not None)


def _graph(folder: Path) -> Path:
    """The folder of the graph to profile."""
    if (folder / "repro.py").is_file():
        return folder
    if not folder.is_dir():
        raise InputError("DUMP", f"there is no folder {str(folder)!r}")
    found = _newest_pruned(folder)
    if found is None:
        raise InputError("DUMP", f"{str(folder)!r} holds no pruned graph; see its index.html")
    return found


def _newest_pruned(folder: Path) -> Path | None:
    pruned = (graph.folder for graph in graphs(folder)[0] if graph.kind == "pruned")
    return next(pruned, None)


def _dumped(arguments: argparse.Namespace, folder: Path) -> tuple[Path | None, Explanation]:
    """Dump one prefill of the named model: the pruned graph, and the explanation."""
    model, inputs = load(arguments)
    quiet_dynamo()
    _say("tracing the model's prefill")
    given: dict[str, Any] = options(arguments) | {"lowering": "eager", "on_unsupported": "ignore"}
    dartfx.compile(model, dump=folder, **given)
    seen = len(dartfx.reports())
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return _newest_pruned(folder), Explanation(tuple(dartfx.reports()[seen:]))


def _profile(folder: Path, trace: Path | None, *, keep: bool) -> int:
    """Profile one graph.  keep: add the result to its report."""
    script = runpy.run_path(str(folder / "repro.py"))
    replay = Replay()
    script["graph"](replay)
    own = folder / TRACE
    _say(f"running {folder.name}, unpruned and pruned")
    try:
        profile = replay.profile(
            script["OPTIONS"], caller=script["CALLER"], mask=script["MASK"], folder=folder,
            trace=str(own),
        )  # fmt: skip
    except NotPruned as error:
        print(f"not profiled: {error}")
        return 1
    print(profile)
    _write(folder, profile, trace, keep)
    return 0


def _write(folder: Path, profile: Profile, trace: Path | None, keep: bool) -> None:
    if keep:
        add_profile(folder, profile, TRACE)
        print(f"wrote {folder / 'report.html'}, report.json and {TRACE}")
    if trace is not None:
        trace.write_bytes((folder / TRACE).read_bytes())
        print(f"wrote {trace}, for chrome://tracing or ui.perfetto.dev")


def _say(what: str) -> None:
    """Print the current step on stderr: stdout holds only the table."""
    print(f"...    {what}", file=sys.stderr, flush=True)
