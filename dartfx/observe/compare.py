"""Two dumps side by side: which graphs differ in outcome, shapes, operators and kept tokens.

Times, versions and options are shown; only what a graph does decides whether two are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dartfx.observe.dumped import Graph, graphs
from dartfx.observe.folders import KEPT, read_json
from dartfx.observe.kept import kept_in_common
from dartfx.observe.units import flops, in_bytes, seconds, short

__all__ = [
    "Comparison",
    "Difference",
    "Pair",
    "collectives",
    "compare",
    "facts",
    "kept_differences",
]

MOST_OPERATORS = 12  # of a pair of graphs; more say only that these are different graphs

# Of report.json, with the words that people read.
FACTS = {
    "kind": "outcome",
    "because": "reason",
    "where": "where",
    "stack": "decoder stack",
    "how": "vision mask",
    "batch": "batch",
    "sequence": "tokens per sample",
    "vision_tokens": "vision tokens",
    "retained": "retained vision tokens",
    "kv_layout": "KV layout",
    "flops": "decoder FLOPs",
    "kv_bytes": "KV cache bytes",
}
CUT_FACTS = {
    "layer": "layer",
    "sequence": "tokens",
    "retained": "retained",
    "crossings": "crossings",
    "across": "ranks",
}


@dataclass(frozen=True)
class Difference:
    """One fact that is not the same in both."""

    what: str
    one: str
    other: str

    def __str__(self) -> str:
        return f"{self.what}: {self.one} -> {self.other}"


@dataclass(frozen=True)
class Pair:
    """The same graph in two dumps; one of them is None where the other has no such graph.

    notes: what differs without being a difference (times, options, versions).
    """

    one: Graph | None
    other: Graph | None
    differences: tuple[Difference, ...]
    notes: tuple[Difference, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name, or both."""
        return " / ".join(dict.fromkeys(g.name for g in (self.one, self.other) if g is not None))

    @property
    def is_news(self) -> bool:
        """Whether vision tokens were dropped in either, or should have been."""
        return any(g.is_news for g in (self.one, self.other) if g is not None)

    @property
    def where(self) -> str:
        """Its source line."""
        shown = self.one or self.other
        return "" if shown is None else str(shown.compilation.get("where", ""))


@dataclass(frozen=True)
class Comparison:
    """All graphs of two dumps, in the order in which they were compiled."""

    one: Path
    other: Path
    pairs: tuple[Pair, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether every graph is in both and does the same."""
        return self.first_difference is None

    @property
    def first_difference(self) -> Pair | None:
        """The first graph that differs."""
        return next((pair for pair in self.pairs if pair.differences), None)

    @property
    def notes(self) -> tuple[Difference, ...]:
        """What every pair notes: options and versions."""
        noted = [pair.notes for pair in self.pairs if pair.one and pair.other]
        return tuple(n for n in noted[0] if all(n in of for of in noted)) if noted else ()

    @property
    def shown(self) -> tuple[Pair, ...]:
        """The pairs that differ, and those of graphs with vision tokens."""
        return tuple(pair for pair in self.pairs if pair.differences or pair.is_news)

    def __str__(self) -> str:
        lines = [f"({note})" for note in self.notes]
        for pair in self.shown:
            same = "" if pair.differences else ": the same"
            lines.append(f"{pair.name} ({short(pair.where)}){same}")
            mark = "first difference: " if pair is self.first_difference else ""
            for number, difference in enumerate(pair.differences):
                lines.append(f"  {mark if number == 0 else ''}{difference}")
            lines += [f"  ({note})" for note in pair.notes if note not in self.notes]
        if hidden := len(self.pairs) - len(self.shown):
            lines.append(f"{hidden} other graphs, without vision tokens: the same")
        differ = sum(bool(pair.differences) for pair in self.pairs)
        verdict = "equal" if self.equal else f"{differ} of {len(self.pairs)} graphs differ"
        return "\n".join([*lines, f"{self.one} and {self.other}: {verdict}"])


def compare(one: Path, other: Path) -> Comparison:
    """Compare two dumps, or two graphs' folders."""
    return Comparison(one, other, tuple(_pairs(_graphs(one), _graphs(other))))


def _graphs(directory: Path) -> list[Graph]:
    """The graphs to compare, oldest first."""
    if directory.name.startswith("graph_"):
        found, _ = graphs(directory.parent)
        return [graph for graph in found if graph.folder == directory]
    found, _ = graphs(directory)
    return [graph for graph in reversed(found) if graph.kind != "abandoned"]


def _pairs(one: list[Graph], other: list[Graph]) -> Iterator[Pair]:
    """Graphs of the same source line in the same order belong together."""
    keys = [[_key(graph) for graph in side] for side in (one, other)]
    matcher = SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    if len(one) == len(other) == 1:
        yield _pair(one[0], other[0])
        return
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            yield from map(_pair, one[a:b], other[c:d])
            continue
        yield from (Pair(g, None, (Difference("graph", g.kind, "none"),)) for g in one[a:b])
        yield from (Pair(None, g, (Difference("graph", "none", g.kind),)) for g in other[c:d])


def _key(graph: Graph) -> tuple[str, bool]:
    return str(graph.compilation.get("where", "")), graph.is_news


def _pair(one: Graph, other: Graph) -> Pair:
    differences = [*facts(one.report, other.report), *_operators(one.report, other.report)]
    differences += kept_differences(one.folder, other.folder)
    notes = list(_notes(one, other))
    return Pair(one, other, tuple(differences), tuple(notes))


def facts(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    """The facts in which two reports of a graph differ."""
    for name, words in FACTS.items():
        if (a := one.get(name)) != (b := other.get(name)):
            yield Difference(words, _shown(a, name), _shown(b, name))
    yield from _collectives(*(report.get("collectives", []) for report in (one, other)))
    cuts = [report.get("cuts", []) for report in (one, other)]
    if len(cuts[0]) != len(cuts[1]):
        yield Difference("number of cuts", str(len(cuts[0])), str(len(cuts[1])))
    for number, (first, second) in enumerate(zip(*cuts, strict=False), start=1):
        for name, words in CUT_FACTS.items():
            # Of one cut, the report itself says these.
            if max(map(len, cuts)) == 1 and name in FACTS:
                continue
            if (a := _plain(name, first)) != (b := _plain(name, second)):
                yield Difference(f"cut {number}, {words}", _shown(a, name), _shown(b, name))


def _collectives(*both: list[str]) -> Iterator[Difference]:
    """Where the order of collectives diverges; ranks would wait for each other there forever."""
    one, other = map(collectives, both)
    for number, (a, b) in enumerate(zip_longest(one, other, fillvalue="none"), start=1):
        if a != b:
            yield Difference(f"collective {number} (of {len(one)} and {len(other)})", a, b)
            return


def collectives(calls: list[str]) -> list[str]:
    """The collectives' short names: ``_c10d_functional.all_reduce.default`` is ``all_reduce``.

    Without the waits, of which each has one.
    """
    names = (call.split(".")[1] if "." in call else call for call in calls)
    return [name for name in names if name != "wait_tensor"]


def _plain(name: str, cut: dict[str, Any]) -> Any:
    """One fact of a cut; of what crosses it the names, whose source lines depend on the machine."""
    value = cut.get(name)
    return [crossing["name"] for crossing in value] if name == "crossings" and value else value


# Pairs of before and after, with their units.
_PAIRS: dict[str, Callable[[int], str]] = {
    "sequence": "{:,}".format, "flops": flops, "kv_bytes": in_bytes,
}  # fmt: skip


def _shown(value: Any, name: str = "") -> str:
    if name in _PAIRS and isinstance(value, list):
        return " to ".join(map(_PAIRS[name], value))
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:,}" if type(value) is int else "none" if value is None else str(value)


def _operators(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    counts = [Counter(report.get("operators") or {}) for report in (one, other)]
    names = sorted(n for n in counts[0].keys() | counts[1].keys() if counts[0][n] != counts[1][n])
    for name in names[:MOST_OPERATORS]:
        a, b = (f"{count[name]} calls" for count in counts)
        yield Difference(f"operator {name}", a, b)
    if len(names) > MOST_OPERATORS:
        a, b = (f"{sum(count.values())} calls in all" for count in counts)
        yield Difference(f"{len(names) - MOST_OPERATORS} more operators", a, b)


def kept_differences(one: Path, other: Path) -> Iterator[Difference]:
    """Where the first calls of two graphs kept different tokens."""
    files = [read_json(folder / KEPT) for folder in (one, other)]
    for common in kept_in_common(*files):
        if common.share < 1:
            a, b = (f"{count} tokens" for count in common.kept)
            what = f"kept tokens of {common.where}, {common.share:.0%} in common (Jaccard)"
            yield Difference(what, a, b)
    counts = [len((file or {}).get("rows", [])) for file in files]
    if counts[0] != counts[1]:
        a, b = (f"{count} rows" if count else "not recorded" for count in counts)
        yield Difference("kept tokens", a, b)


def _notes(one: Graph, other: Graph) -> Iterator[Difference]:
    for what, taken in _TIMES.items():
        times = [float(taken(graph.report) or 0) for graph in (one, other)]
        if any(times):
            a, b = (seconds(time) if time else "not known" for time in times)
            yield Difference(what, a, b)
    for name in ("options", "versions"):
        first, second = (g.compilation.get(name) or {} for g in (one, other))
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                a, b = (str(side.get(key, "default")) for side in (first, second))
                yield Difference(key, a, b)


def _run_time(report: dict[str, Any]) -> float:
    """Of the pruned graph, where ``dartfx profile`` measured it."""
    return sum(
        float(region["seconds"][1]) for region in report.get("profile", {}).get("regions", ())
    )


_TIMES: dict[str, Callable[[dict[str, Any]], float]] = {
    "time in the passes": lambda report: sum(report.get("seconds", {}).values()),
    "time to compile": lambda report: sum(report.get("compile", {}).get("seconds", {}).values()),
    "time of a run, as profiled": _run_time,
}
