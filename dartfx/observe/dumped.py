"""Reading a dump: its graphs with their outcomes, and the calls in which no pruned graph ran."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dartfx.observe.folders import COMPILATION, UNPRUNED, read_json

__all__ = ["Graph", "graphs", "is_dump", "unpruned_calls"]


@dataclass(frozen=True)
class Graph:
    """One graph's folder: where it is, who compiled it (compilation.json) and its report.json.

    name: relative to the dump, as ``rank_1/graph_000``; report: empty where compiling was not
    finished.
    """

    name: str
    folder: Path
    compilation: dict[str, Any]
    report: dict[str, Any]

    @property
    def kind(self) -> str:
        """``pruned``, ``declined``, ``unchanged``, ``returnsmask``, ``abandoned`` or
        ``unfinished``."""
        if "abandoned" in self.compilation:
            return "abandoned"
        return str(self.report.get("kind", "unfinished"))

    @property
    def because(self) -> str:
        """Why it was not pruned, or how it was."""
        if "abandoned" in self.compilation:
            return str(self.compilation["abandoned"])
        if self.kind == "unfinished":
            return "its compilation has not ended, or the process did"
        if self.kind != "pruned":
            return str(self.report.get("because", ""))
        cuts = ", ".join(str(cut["layer"]) for cut in self.report["cuts"])
        one, other = self.report["vision_tokens"], self.report["retained"]
        return f"before decoder layer {cuts}: {one} -> {other} vision tokens per sample"

    @property
    def is_news(self) -> bool:
        """Whether vision tokens were dropped here, or should have been."""
        unsure = self.report.get("all_retained") or self.report.get("unsure")
        return self.kind in ("pruned", "declined", "returnsmask") or bool(unsure)

    @property
    def seconds(self) -> float:
        """What the passes took."""
        return float(sum(self.report.get("seconds", {}).values()))


def graphs(directory: Path, most: int | None = None) -> tuple[list[Graph], int]:
    """The graphs of a dump, newest first, ``most`` of each rank; and how many are left out."""
    found, left_out = [], 0
    for parent in [directory, *directory.glob("rank_*")]:
        named = [f for f in parent.glob("graph_*") if f.name[6:].isdecimal()]
        named.sort(key=lambda folder: int(folder.name[6:]), reverse=True)
        found += named[:most]
        left_out += len(named) - len(named[:most])
    read = [
        Graph(
            folder.relative_to(directory).as_posix(),
            folder,
            _dict(folder / COMPILATION),
            _dict(folder / "report.json"),
        )
        for folder in found
    ]
    read.sort(key=lambda g: (g.compilation.get("started", 0.0), g.name), reverse=True)
    return read, left_out


def is_dump(directory: Path) -> bool:
    """Whether there is any graph's folder, or calls that ran unpruned."""
    return any(
        next(directory.glob(f"{under}{name}"), None) is not None
        for under in ("", "rank_*/")
        for name in ("graph_*", UNPRUNED)
    )


def unpruned_calls(directory: Path) -> list[dict[str, Any]]:
    """Calls with vision tokens in which no pruned graph ran, by reason; the latest first."""
    files = [*directory.glob(UNPRUNED), *directory.glob(f"rank_*/{UNPRUNED}")]
    found = [call for file in files for call in read_json(file) or []]
    return sorted(found, key=lambda call: float(call["last"]), reverse=True)


def _dict(path: Path) -> dict[str, Any]:
    read = read_json(path)
    return read if isinstance(read, dict) else {}
