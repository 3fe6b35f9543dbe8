"""The layout of a graph's picture: bars of sequence length, side inputs, cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from dartfx.observe.html.structure import Part

__all__ = ["Drawing"]

HEIGHT, LEFT, LANE = 190, 48, 16
WIDTH = 1120


@dataclass(frozen=True)
class Bar:
    """One part of the main path; the picture's y axis points down."""

    part: Part
    x: float
    tops: tuple[float, float]  # before and after
    shown: str  # its label, or "" where there is no room


@dataclass(frozen=True)
class Lane:
    """A part off the main path, drawn under the bars that it feeds."""

    part: Part
    y: int
    ends: tuple[float, float]


class Drawing:
    """The picture of one graph.

    way: the main path; found: all parts; order: which feeds which; cuts: paths of the parts that
    are the first after a cut.
    """

    def __init__(
        self,
        way: Sequence[Part],
        found: Mapping[str, Part],
        order: nx.DiGraph,
        cuts: Collection[str],
    ) -> None:
        self.step = max(9.0, min(44.0, (WIDTH - LEFT) / max(len(way), 1)))
        self.longest = max((max(p.length) for p in way), default=0) or 1
        self.left, self.height = LEFT, HEIGHT
        self.bars = [
            Bar(part, LEFT + i * self.step, (self._y(part.length[0]), self._y(part.length[1])),
                _shown(part, i, self.step))
            for i, part in enumerate(way)
        ]  # fmt: skip
        self.ticks = [(self._y(n), n) for n in (0, self.longest // 2, self.longest)]
        place = {bar.part.path: bar.x + self.step / 2 for bar in self.bars}
        self.cuts = [b.x for b in self.bars if b.part.path in cuts]
        self.lanes = list(self._lanes(found, order, place))
        self.below = HEIGHT + 90
        self.full = (round(LEFT + len(way) * self.step + 60), self.below + LANE * len(self.lanes))

    def _y(self, tokens: int) -> float:
        return round(HEIGHT - (HEIGHT - 12) * tokens / self.longest, 1)

    def _lanes(
        self, found: Mapping[str, Part], order: nx.DiGraph, place: Mapping[str, float]
    ) -> list[Lane]:
        lanes: list[Lane] = []
        for path, part in found.items():
            fed = [place[p] for p in order.successors(path) if p in place]
            if path not in place and fed:
                y = HEIGHT + 90 + LANE * len(lanes)
                lanes.append(Lane(part, y, (min(fed), max(fed))))
        return lanes


def _shown(part: Part, place: int, step: float) -> str:
    """Layers are many and in order: every fourth is labelled."""
    if part.layer < 0:
        return part.label
    return part.label if part.layer % (1 if step >= 30 else 4) == 0 else ""
