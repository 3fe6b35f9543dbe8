"""Graph dumps: one folder per graph, a numbered file after every pass, and a report."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch.fx import GraphModule

from dartfx.passes.graph import render
from dartfx.report import Report, as_json

__all__ = ["Dump"]


class Dump:
    """Writes one graph's stages under ``directory``; writes nothing when that is None."""

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self._folder = None if directory is None else _new_folder(Path(directory))
        self._step = itertools.count()

    def __call__(self, name: str, module: GraphModule) -> None:
        """The graph after the pass ``name``."""
        if self._folder is not None:
            file = f"{next(self._step):02d}_{name.replace(' ', '_')}.txt"
            (self._folder / file).write_text(render(module))

    def finish(self, report: Report) -> None:
        """What became of the graph, for people (``report.txt``) and programs (``report.json``)."""
        if self._folder is not None:
            (self._folder / "report.txt").write_text(f"{report}\n")
            (self._folder / "report.json").write_text(as_json(report))


def _new_folder(directory: Path) -> Path:
    """The first ``graph_NNN`` that does not exist yet, made here so that processes never share."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = directory / f"graph_{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")
