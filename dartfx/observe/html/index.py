"""``index.html`` of a dump: what became of each graph, newest first."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dartfx.observe.dumped import Graph, graphs, unpruned_calls
from dartfx.observe.folders import write
from dartfx.observe.html.templating import render

__all__ = ["MOST_GRAPHS", "index", "write_index"]

MOST_GRAPHS = 200  # of each rank; a server that dumps for a day makes more
KINDS = {
    "pruned": "pruned",
    "declined": "NOT pruned",
    "returnsmask": "returns the vision mask",
    "unchanged": "unchanged",
    "abandoned": "given up",
    "unfinished": "unfinished",
}


def write_index(directory: Path) -> None:
    """Write the page for all that is in the dump now."""
    write(directory / "index.html", index(directory))


def index(directory: Path) -> str:
    """The page; its links are relative to the dump."""
    listed, left_out = graphs(directory, MOST_GRAPHS)
    counts = Counter(graph.kind for graph in listed)
    processes: dict[tuple[object, object], list[Graph]] = {}
    for graph in listed:
        made = graph.compilation
        processes.setdefault((made.get("rank"), made.get("process")), []).append(graph)
    return render(
        "index.html.jinja",
        directory=directory.resolve(),
        kinds=KINDS,
        counts=[(KINDS[kind], counts[kind]) for kind in KINDS if counts[kind]],
        processes=processes,
        left_out=left_out,
        calls=unpruned_calls(directory),
    )
