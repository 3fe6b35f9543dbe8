"""What each pass changed: nodes added, removed and changed, counted and side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

__all__ = ["Change", "Row", "change", "operator"]

MOST_ROWS = 200  # the files next to the page hold the rest
_OPERATOR = re.compile(r" = ([\w.<>]+)\(")
_AROUND = 1  # unchanged lines shown before and after a change


@dataclass(frozen=True)
class Row:
    """One line of a diff.  kind: "same", "changed", "added", "removed" or "gap"."""

    kind: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Change:
    """What one pass did.  operators: (operator, added, removed, changed), most touched first.

    seconds: None where it was not timed; left_out: rows that are not shown.
    """

    name: str
    file: str
    seconds: float | None
    nodes: int
    added: int
    removed: int
    changed: int
    operators: tuple[tuple[str, int, int, int], ...]
    rows: tuple[Row, ...]
    left_out: int

    @property
    def nothing(self) -> bool:
        """Whether the pass changed nothing."""
        return not (self.added or self.removed or self.changed)


def change(
    name: str, file: str, seconds: float | None, before: Mapping[str, str], after: Mapping[str, str]
) -> Change:
    """Compare two states of a graph, each as its lines by the name of the node.

    Nodes keep their names from pass to pass, so that names say which lines belong together.
    """
    rows = list(_rows(before, after))
    counts = Counter(row.kind for row in rows)
    shown, left_out = _shown(rows)
    operators: dict[str, Counter[str]] = {}
    for row in rows:
        if row.kind != "same":
            operators.setdefault(operator(row.after or row.before), Counter())[row.kind] += 1
    listed = sorted(operators.items(), key=lambda item: -item[1].total())
    return Change(
        name, file, seconds, len(after), counts["added"], counts["removed"], counts["changed"],
        tuple((op, n["added"], n["removed"], n["changed"]) for op, n in listed),
        tuple(shown), left_out,
    )  # fmt: skip


def operator(line: str) -> str:
    """The operator that a line calls, as ``aten.gather.default``."""
    found = _OPERATOR.search(line)
    return found[1] if found is not None else "(input or output)"


def _rows(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Row]:
    one, other = list(before), list(after)
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    for kind, start, end, start_after, end_after in matcher.get_opcodes():
        if kind == "equal":
            for name in one[start:end]:
                same = before[name] == after[name]
                yield Row("same" if same else "changed", before[name], after[name])
            continue
        # A node that moved is in both graphs, and is shown where it was and where it is.
        yield from (Row("removed", before[name]) for name in one[start:end])
        yield from (Row("added", "", after[name]) for name in other[start_after:end_after])


def _shown(rows: list[Row]) -> tuple[list[Row], int]:
    """The changed rows with those around them; and how many changed ones are left out."""
    touched = [i for i, row in enumerate(rows) if row.kind != "same"]
    shown: list[Row] = []
    last = -1
    for number, i in enumerate(touched):
        if len(shown) >= MOST_ROWS:
            return shown, len(touched) - number
        for at in range(max(i - _AROUND, last + 1), min(i + _AROUND + 1, len(rows))):
            if last >= 0 and at > last + 1:
                shown.append(Row("gap", f"{at - last - 1} unchanged"))
            shown.append(rows[at])
            last = at
    return shown, 0
