"""Where the time of each row of ``bench generate`` goes, one panel per number of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

_COLOURS = {"vision_tower": "tab:gray", "prefill": "tab:blue", "decode": "tab:orange"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plot; the suffix of ``path`` says as what.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = result["settings"]["new_tokens"]
    rows = [row for row in result["rows"] if not row["failed"]][::-1]
    figure, axes = pyplot.subplots(
        1,
        len(lengths),
        figsize=(3.2 * len(lengths) + 1.5, 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, n in zip(axes[0], lengths, strict=True):
        _panel(panel, rows, n)
        panel.set_title(f"{n} new token{'s' * (n > 1)}", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.supxlabel("milliseconds")
    model, machine = result["model"], result["machine"]
    figure.suptitle(
        f"{model['name']}, {model['vision_tokens']} to {model['retained']} vision tokens, "
        f"{model['dtype']}, {machine['device']}, {machine['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, rows: list[Any], n: int) -> None:
    """Bars of the three parts, or of the total where the vision tower cannot be separated."""
    labels = [row["label"] for row in rows]
    totals = [1e3 * row["seconds"][n] for row in rows]
    if any(row["shares"] is None for row in rows):
        panel.barh(labels, totals, label="total")
        return
    start = [0.0] * len(rows)
    for part, colour in _COLOURS.items():
        widths = [t * row["shares"][n][part] for t, row in zip(totals, rows, strict=True)]
        panel.barh(labels, widths, left=start, color=colour, label=part.replace("_", " "))
        start = [a + b for a, b in zip(start, widths, strict=True)]
