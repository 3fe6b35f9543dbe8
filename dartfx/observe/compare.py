"""Two dumps side by side: which graphs differ in outcome, shapes, operators and kept tokens.

Times, versions and options are shown; only what a graph does decides whether two are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from dartfx.observe.dumped import Graph, graphs
from dartfx.observe.folders import KEPT, read_json

__all__ = ["Comparison", "Difference", "Pair", "compare", "facts", "kept_in_common"]

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
    "collectives": "collectives, in order",
}
CUT_FACTS = {"layer": "layer", "sequence": "tokens", "crossings": "crossings", "across": "ranks"}


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

    def __str__(self) -> str:
        lines = []
        for pair in self.pairs:
            same = "" if pair.differences else ": the same"
            lines.append(f"{pair.name} ({pair.where}){same}")
            mark = "first difference: " if pair is self.first_difference else ""
            for number, difference in enumerate(pair.differences):
                lines.append(f"  {mark if number == 0 else ''}{difference}")
            lines += [f"  ({note})" for note in pair.notes]
        differ = sum(bool(pair.differences) for pair in self.pairs)
        verdict = "equal" if self.equal else f"{differ} of {len(self.pairs)} graphs differ"
        return "\n".join([*lines, f"{self.one} and {self.other}: {verdict}"])


def compare(one: Path, other: Path) -> Comparison:
    """Compare two dumps, or two graphs' folders."""
    return Comparison(one, other, tuple(_pairs(_graphs(one), _graphs(other))))


def _graphs(directory: Path) -> list[Graph]:
    """The graphs that count, oldest first."""
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
    differences += _kept(one.folder, other.folder)
    notes = list(_notes(one, other))
    return Pair(one, other, tuple(differences), tuple(notes))


def facts(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    """What two reports say of a graph that is not the same."""
    for name, words in FACTS.items():
        if (a := one.get(name)) != (b := other.get(name)):
            yield Difference(words, _shown(a), _shown(b))
    cuts = [report.get("cuts", []) for report in (one, other)]
    if len(cuts[0]) != len(cuts[1]):
        yield Difference("number of cuts", str(len(cuts[0])), str(len(cuts[1])))
    for number, (first, second) in enumerate(zip(*cuts, strict=False), start=1):
        for name, words in CUT_FACTS.items():
            if _plain(name, first) != _plain(name, second):
                a, b = (_shown(_plain(name, cut)) for cut in (first, second))
                yield Difference(f"cut {number}, {words}", a, b)


def _plain(name: str, cut: dict[str, Any]) -> Any:
    """One fact of a cut; of what crosses it the names, whose source lines depend on the machine."""
    value = cut.get(name)
    return [crossing["name"] for crossing in value] if name == "crossings" and value else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)


def _operators(one: dict[str, Any], other: dict[str, Any]) -> Iterator[Difference]:
    counts = [Counter(report.get("operators") or {}) for report in (one, other)]
    for name in sorted(counts[0].keys() | counts[1].keys()):
        a, b = counts[0][name], counts[1][name]
        if a != b:
            yield Difference(f"operator {name}", f"{a} calls", f"{b} calls")


def kept_in_common(one: Any, other: Any) -> list[tuple[int, float]]:
    """Row and Jaccard index (common over all) of the kept tokens of two kept.json files."""
    rows = zip((one or {}).get("rows", []), (other or {}).get("rows", []), strict=False)
    found = []
    for number, (first, second) in enumerate(rows):
        a, b = set(first["kept"]), set(second["kept"])
        found.append((number, len(a & b) / max(len(a | b), 1)))
    return found


def _kept(one: Path, other: Path) -> Iterator[Difference]:
    files = [read_json(folder / KEPT) for folder in (one, other)]
    counts = [[len(row["kept"]) for row in (file or {}).get("rows", [])] for file in files]
    for row, common in kept_in_common(*files):
        if common < 1:
            a, b = (f"{count[row]} tokens" for count in counts)
            yield Difference(f"kept tokens of row {row}, {common:.0%} in common (Jaccard)", a, b)
    if len(counts[0]) != len(counts[1]):
        a, b = (f"{len(count)} rows" if count else "not recorded" for count in counts)
        yield Difference("kept tokens", a, b)


def _notes(one: Graph, other: Graph) -> Iterator[Difference]:
    if one.seconds or other.seconds:
        yield Difference("passes", f"{one.seconds:.2f} s", f"{other.seconds:.2f} s")
    for name in ("options", "versions"):
        first, second = (g.compilation.get(name) or {} for g in (one, other))
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                a, b = (str(side.get(key, "default")) for side in (first, second))
                yield Difference(key, a, b)
