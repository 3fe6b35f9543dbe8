"""Which tokens a call kept, as the plain data of ``kept.json``."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Set
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

from dartfx.observe.folders import KEPT, read_json, write, write_json
from dartfx.runtime.keep_idx import KeepIdxRecord

__all__ = [
    "Common",
    "Grid",
    "add_picture",
    "fill",
    "grids",
    "kept_in_common",
    "kept_rows",
    "note_views",
]


def kept_rows(record: KeepIdxRecord) -> dict[str, Any]:
    """By row: the prompt's vision tokens, those that were kept, and the pivots that picked them.

    All are positions in the prompt; pivots is empty for selectors other than "dart".  Waits for
    the record's device.
    """
    assert record.vision_mask is not None
    rows = []
    for number, mask in enumerate(record.vision_mask.cpu()):
        vision = mask.nonzero()[:, 0].tolist()
        keep = set(record.keep_idx[number].tolist())
        kept = [position for position in vision if position in keep]
        picker = [] if record.picker is None else record.picker[number].tolist()
        pivots = sorted({picker[position] for position in kept} - {-1}) if picker else []
        rows.append({"vision": vision, "kept": kept, "pivots": pivots})
    return {"rows": rows}


def _images(row: dict[str, Any]) -> list[list[int]]:
    """The positions of a row's images: of each unbroken run of its vision tokens."""
    runs: list[list[int]] = []
    for position in row["vision"]:
        if not runs or position != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(position)
    return runs


def note_views(directory: Path, views: Iterable[tuple[int, Mapping[int, int]]]) -> None:
    """Add to the newest kept.json of a dump which view (tile, frame, overview) a token is of.

    views: for each image its row, and the view of each of its positions that has one.
    """
    files = [*directory.glob(f"graph_*/{KEPT}"), *directory.glob(f"rank_*/graph_*/{KEPT}")]
    if not files:
        return
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    kept = read_json(newest)
    by_row: dict[int, list[list[tuple[int, int]]]] = {}
    for row, of_image in views:
        by_row.setdefault(row, []).append(list(of_image.items()))
    for row, images_of_row in by_row.items():
        kept["rows"][row]["views"] = images_of_row
    write_json(newest, kept)


class Common(NamedTuple):
    """Kept tokens in both: where, their Jaccard index (common over all), how many each kept."""

    where: str
    share: float
    kept: tuple[int, int]

    @classmethod
    def of(cls, where: str, kept: tuple[Set[int], Set[int]], span: Set[int]) -> Common:
        """Of the tokens in ``span`` only."""
        a, b = kept[0] & span, kept[1] & span
        return cls(where, len(a & b) / len(a | b) if a | b else 1.0, (len(a), len(b)))


def kept_in_common(one: Any, other: Any) -> Iterator[Common]:
    """What two kept.json files have in common, by row, by image, and by view where one is known."""
    rows = zip((one or {}).get("rows", []), (other or {}).get("rows", []), strict=False)
    for number, (first, second) in enumerate(rows):
        kept = set(first["kept"]), set(second["kept"])
        parts = list(_parts(first))
        yield Common.of(f"row {number}", kept, {*first["vision"], *second["vision"]})
        if first["vision"] == second["vision"] and len(parts) > 1:
            yield from (Common.of(f"row {number}, {name}", kept, span) for name, span in parts)


def _parts(row: dict[str, Any]) -> Iterator[tuple[str, Set[int]]]:
    """The images of a row, and their views: the frames, tiles or overview of each."""
    runs = _images(row)
    for number, run in enumerate(runs):
        yield f"image {number}", set(run)
    for number, of_image in enumerate(row.get("views", ())):
        spans: dict[int, set[int]] = {}
        for position, view in of_image:
            spans.setdefault(view, set()).add(position)
        if len(spans) > 1:
            yield from ((f"image {number}, view {view}", span) for view, span in spans.items())


class Grid(NamedTuple):
    """The vision tokens of one image: their states in reading order, ``columns`` a line."""

    title: str
    columns: int
    states: list[str]  # "kept", "pivot" or "dropped"

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return -(-len(self.states) // self.columns)


def grids(kept: dict[str, Any] | None) -> Iterator[Grid]:
    """A grid for each unbroken run of vision tokens: square where their number is."""
    for number, row in enumerate((kept or {}).get("rows", [])):
        stays, pivots = set(row["kept"]), set(row["pivots"])
        for image, run in enumerate(_images(row)):
            states = [
                "pivot" if p in pivots and p in stays else "kept" if p in stays else "dropped"
                for p in run
            ]
            count = len(states) - states.count("dropped")
            title = f"row {number}, image {image}: {count} of {len(states)} tokens kept"
            side = isqrt(len(states))
            yield Grid(title, side if side * side == len(states) else min(len(states), 64), states)


def add_picture(folder: Path, png: bytes) -> None:
    """Show a picture in the report of a graph's folder, above the grids of kept tokens."""
    page, data = folder / "report.html", base64.b64encode(png).decode()
    image = f'<img alt="kept tokens over the image" src="data:image/png;base64,{data}">'
    write(page, fill(page.read_text(), "picture", image))


def fill(page: str, name: str, html: str) -> str:
    """A report with ``html`` where it leaves room for what is known only later."""
    start, end = f'<div id="{name}">', f"</div><!-- {name} -->"
    before, opened, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    return f"{before}{opened}{html}{closed}{after}" if closed else page
