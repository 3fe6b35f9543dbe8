"""``index.html`` of a dump: the outcome of each graph, newest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dartfx.observe.compare import Difference, collectives, facts, kept_differences
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


class RanksRow(NamedTuple):
    """One graph on every rank (None where it has none), and what differs from the first rank."""

    name: str
    graphs: list[Graph | None]
    differences: list[str]


class Ranks(NamedTuple):
    """The graphs of several ranks, in the order of compilation; first: the first that differs."""

    names: list[str]
    rows: list[RanksRow]
    first: RanksRow | None


def write_index(directory: Path) -> None:
    """Write the page for the dump's current contents."""
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
        ranks=_ranks(listed),
        collectives=collectives,
        calls=unpruned_calls(directory),
    )


def _ranks(listed: Sequence[Graph]) -> Ranks | None:
    """The ranks side by side; None in a dump of one."""
    by_rank: dict[str, dict[str, Graph]] = {}
    for graph in listed:
        rank, _, name = graph.name.rpartition("/")
        if rank and graph.kind != "abandoned":
            by_rank.setdefault(rank.removeprefix("rank_"), {})[name] = graph
    names = sorted(by_rank, key=lambda rank: (len(rank), rank))
    if len(names) < 2:
        return None
    rows = []
    for name in sorted({name for found in by_rank.values() for name in found}):
        row = [by_rank[rank].get(name) for rank in names]
        differences = [
            f"rank {names[0]} -> {rank}: {difference}"
            for rank, graph in zip(names[1:], row[1:], strict=True)
            for difference in _differences(row[0], graph)
        ]
        rows.append(RanksRow(name, row, differences))
    return Ranks(names, rows, next((row for row in rows if row.differences), None))


def _differences(one: Graph | None, other: Graph | None) -> Iterator[Difference]:
    yield from facts(*({} if graph is None else graph.report for graph in (one, other)))
    if one is not None and other is not None:
        yield from kept_differences(one.folder, other.folder)
