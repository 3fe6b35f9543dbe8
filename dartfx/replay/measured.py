"""The result of a profile, as a table, as plain data, and in the report of a dumped graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dartfx.observe.folders import read_json, write, write_json
from dartfx.observe.html.templating import render
from dartfx.observe.kept import fill
from dartfx.observe.units import flops, in_bytes

__all__ = ["Profile", "Region", "add_profile"]

_APART = 0.1  # of all: a share of time and one of FLOPs that are further apart are remarked on
_SLOWER = 0.9  # how far the measured gain may be below the predicted one, likewise


@dataclass(frozen=True)
class Region:
    """A part of the graph, unpruned and pruned: mean seconds of a run, FLOPs, bytes computed."""

    name: str
    seconds: tuple[float, float]
    flops: tuple[int, int]
    bytes: tuple[int, int]


@dataclass(frozen=True)
class Profile:
    """All regions in the order in which they run.  runs: how many were measured of each graph."""

    regions: tuple[Region, ...]
    device: str
    runs: int

    @property
    def total(self) -> Region:
        """The whole graph."""
        pairs = [
            tuple(sum(getattr(region, name)[side] for region in self.regions) for side in (0, 1))
            for name in ("seconds", "flops", "bytes")
        ]
        return Region("whole graph", *pairs)

    def sentences(self) -> Iterator[str]:
        """Where time and FLOPs part: what is gained in all, and regions of the pruned graph."""
        total = self.total
        fewer, faster = _times(total.flops), _times(total.seconds)
        if faster < _SLOWER * fewer:
            yield (
                f"the whole graph is {faster:.2f}x as fast with {fewer:.2f}x fewer FLOPs: time "
                f"falls less than arithmetic, most of it now goes to {self._largest().name}"
            )
        for region in self.regions:
            time, work = self.shares(region)
            if abs(time - work) > _APART:
                how = "more" if time > work else "less"
                yield (
                    f"{region.name}: {time:.0%} of the pruned graph's time for {work:.0%} of its "
                    f"FLOPs, {how} than its arithmetic explains"
                )

    @property
    def rows(self) -> tuple[Region, ...]:
        """All regions, then the whole graph."""
        return (*self.regions, self.total)

    def shares(self, region: Region) -> tuple[float, float]:
        """A region's shares of the pruned graph's time and of its FLOPs."""
        total = self.total
        return region.seconds[1] / (total.seconds[1] or 1), region.flops[1] / (total.flops[1] or 1)

    def _largest(self) -> Region:
        return max(self.regions, key=lambda region: region.seconds[1])

    def __str__(self) -> str:
        lines = [
            f"{'':<22} {'time, ms':^25} {'FLOPs':^28} {'bytes computed':^20}",
            f"{'region':<22} {'unpruned':>9} {'pruned':>9} {'':>5} {'unpruned':>11} {'pruned':>11} "
            f"{'':>4} {'unpruned':>9} {'pruned':>9}",
        ]
        for region in self.rows:
            (one, other), (time, work) = region.seconds, self.shares(region)
            lines.append(
                f"{region.name:<22} {1000 * one:>9.3f} {1000 * other:>9.3f} {time:>5.0%} "
                f"{flops(region.flops[0]):>11} {flops(region.flops[1]):>11} {work:>4.0%} "
                f"{in_bytes(region.bytes[0]):>9} {in_bytes(region.bytes[1]):>9}"
            )
        how = f"mean of {self.runs} runs on {self.device}, operator by operator"
        return "\n".join([*lines, how, *self.sentences()])


def _times(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] if pair[1] else 1.0


def add_profile(folder: Path, profile: Profile, trace: str) -> None:
    """Write a profile into the report.json and report.html of a graph's folder.

    trace: name of the Chrome trace in that folder.
    """
    read = read_json(folder / "report.json")
    found = asdict(profile) | {"sentences": list(profile.sentences()), "trace": trace}
    write_json(folder / "report.json", (read or {}) | {"profile": found})
    page = folder / "report.html"
    if page.is_file():
        shown = render("profile.html.jinja", profile=profile, trace=trace)
        write(page, fill(page.read_text(), "profile", shown))
