"""Arithmetic on the samples of ``bench generate``, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["limits", "markdown", "row_figures", "shares", "speed_ups", "tables"]

Totals = Mapping[int, float]
"""Median seconds of ``generate`` by number of new tokens; 1 among them."""


def row_figures(totals: Totals, tower: float | None, batch: int = 1) -> dict[str, Any]:
    """Time to first token, decode tokens per second, and the parts of every total.

    tower: seconds of the vision tower, None where it could not be separated.  batch: prompts in
    every call; rates count the tokens of all.
    """
    longest = max(totals)
    decode = totals[longest] - totals[1]
    return {
        "seconds": dict(totals),
        "first_token_seconds": totals[1],
        "prompts_per_second": batch / totals[1],
        # Noise may swallow the difference of short runs; a rate would then be none.
        "decode_tokens_per_second": batch * (longest - 1) / decode if decode > 0 else None,
        "shares": None if tower is None else {n: shares(totals, tower, n) for n in totals},
    }


def shares(totals: Totals, tower: float, new_tokens: int) -> dict[str, float]:
    """Vision tower, rest of the prefill and decode as parts of one total; they add up to 1."""
    total = totals[new_tokens]
    parts = {
        "vision_tower": tower,
        "prefill": totals[1] - tower,
        "decode": total - totals[1],
    }
    return {name: part / total for name, part in parts.items()}


def speed_ups(base: Totals, totals: Totals, tower: float) -> dict[str, Any]:
    """How many times faster than ``base``: prefill without the vision tower, and every total."""
    return {
        "prefill": (base[1] - tower) / (totals[1] - tower),
        "total": {n: base[n] / totals[n] for n in base},
    }


def limits(base: Totals, tower: float, prefill_left: float) -> dict[str, Any]:
    """The speed-ups of ``base`` when ``prefill_left`` of its prefill's time remains.

    Amdahl's law: vision tower and decode stay as they are.
    """
    rest = (base[1] - tower) * prefill_left
    return speed_ups(base, {n: total - base[1] + tower + rest for n, total in base.items()}, tower)


def tables(result: Mapping[str, Any]) -> str:
    """All figures as Markdown."""
    lengths = result["settings"]["new_tokens"]
    parts = [_times(result["rows"], lengths), _parts(result, lengths), _ratios(result, lengths)]
    failed = [f"{row['label']}: FAILED: {row['failed']}" for row in result["rows"] if row["failed"]]
    return "\n\n".join([*filter(None, parts), *failed])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column of labels."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(rows: Sequence[Any], lengths: Sequence[int]) -> str:
    later = [n for n in lengths if n > 1]
    head = ["", "first token, ms", "decode, tokens/s", *(f"{n} tokens, ms" for n in later)]
    head += ["prompts/s", "peak memory, GB", "KV cache, MB", "compile and warm-up, s"]
    lines = []
    for row in rows:
        if row["failed"]:
            lines.append([row["label"], "failed", *["-"] * (len(head) - 2)])
            continue
        rate, peak = row["decode_tokens_per_second"], row["peak_bytes"]
        cells = [row["label"], f"{row['first_token_seconds'] * 1e3:.1f}"]
        cells += ["-" if rate is None else f"{rate:.1f}"]
        cells += [f"{row['seconds'][n] * 1e3:.1f}" for n in later]
        cells += [f"{row['prompts_per_second']:.1f}"]
        cells += ["-" if peak is None else f"{peak / 1e9:.2f}", f"{row['kv_bytes'] / 1e6:.2f}"]
        cells += [f"{row['warmup_seconds']:.0f}"]
        lines.append(cells)
    return markdown(head, lines)


def _parts(result: Mapping[str, Any], lengths: Sequence[int]) -> str:
    tower = result["vision_tower_seconds"]
    if tower is None:
        return "vision tower: not measured (the model has no get_image_features of its own)"
    head = ["vision tower / prefill / decode, %", *(f"{n} new" for n in lengths)]
    lines = []
    for row in result["rows"]:
        if not row["failed"]:
            each = [row["shares"][n].values() for n in lengths]
            cells = [" / ".join(f"{100 * part:.0f}" for part in parts) for parts in each]
            lines.append([row["label"], *cells])
    return f"Vision tower {tower * 1e3:.1f} ms in every row.\n\n" + markdown(head, lines)


def _ratios(result: Mapping[str, Any], lengths: Sequence[int]) -> str:
    labels = {row["name"]: row["label"] for row in result["rows"]}
    labels |= {
        "flops": "limit: prefill as fast as its FLOPs allow",
        "unpruned": f"limit: layers from {result['model']['layer']} on cost nothing",
    }
    head = ["times faster than plain Inductor", "prefill", *(f"{n} new" for n in lengths)]
    lines = []
    for name, ratios in (result["speed_ups"] | result["limits"]).items():
        cells = [ratios["prefill"], *(ratios["total"][n] for n in lengths)]
        lines.append([labels[name], *(f"{ratio:.2f}" for ratio in cells)])
    return markdown(head, lines) if lines else ""
