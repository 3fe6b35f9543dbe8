"""Plots accuracy over retained tokens: a line per selector, a panel per type of question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dartfx.tools.evaluate.results import Results
from dartfx.tools.evaluate.scores import MEAN, chance

__all__ = ["draw"]


def draw(results: Results, layer: int, path: Path) -> None:
    """Write the plot in the format of ``path``'s suffix.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [*results.sample.types, MEAN]
    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(3.2 * across, 2.6 * down), sharey=True, layout="constrained"
    )
    panels = axes.flat if len(kinds) > 1 else [axes]
    for kind, panel in zip(kinds, panels, strict=False):
        _panel(panel, results, layer, kind)
    for panel in list(panels)[len(kinds) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.supxlabel("vision tokens kept")
    figure.supylabel("accuracy, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, results: Results, layer: int, kind: str) -> None:
    full = results.sample.figures(results.full)[kind].value
    panel.axhline(100 * full, color="black", linewidth=0.8, label="unpruned")
    guess = chance(results.questions)[kind]
    panel.axhline(100 * guess, color="grey", linestyle=":", label="commonest answer")
    keys = sorted(k for k in results.settings() if k[0] == layer)
    for selector in dict.fromkeys(key[1] for key in keys):
        line = [k for k in keys if k[1] == selector and 0 < k[2] < results.vision_tokens]
        points = [results.figures(k, "accuracy")[kind] for k in line]
        kept = [results.tokens.get(k, k[2]) for k in line]
        panel.plot(kept, [100 * p.value for p in points], marker=".", label=selector)
        ends = [[100 * p.low for p in points], [100 * p.high for p in points]]
        panel.fill_between(kept, *ends, alpha=0.15)
    panel.set_xscale("log", base=2)
    ticks = sorted({k[2] for k in keys if 0 < k[2] < results.vision_tokens})
    panel.set_xticks(ticks, labels=map(str, ticks), fontsize=7)
    panel.minorticks_off()
    panel.set_title(kind, fontsize=9)
