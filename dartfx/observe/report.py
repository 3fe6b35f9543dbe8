"""What the compiler did to each graph: the objects that ``dartfx.reports()`` returns."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields

from dartfx.observe.compilation import Compilation
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.refusal import Declined
from dartfx.runtime.collecting import collecting

__all__ = [
    "MOST_REPORTS",
    "Report",
    "as_json",
    "clear",
    "collect_reports",
    "discard",
    "isolate_reports",
    "latest",
    "one_line",
    "record",
    "reports",
    "since",
]


MOST_REPORTS = 1000  # a server compiles new shapes for as long as it runs


@dataclass(frozen=True)
class Report:
    """One graph of a compiled call and its outcome.

    graph: running number since the last reset; nodes: the graph's size as dynamo gave it;
    outcome: Pruned (every figure of the cut), Declined (why, where, what to try), Unchanged
    (nothing to do, and why) or ReturnsMask (merges vision tokens for a later graph);
    compilation: what compiling it took, filled in once it is compiled.
    """

    graph: int
    nodes: int
    outcome: Outcome
    compilation: Compilation = field(default_factory=Compilation, compare=False)

    @property
    def pruned(self) -> bool:
        """Whether this graph was rewritten."""
        return isinstance(self.outcome, Pruned)

    def __str__(self) -> str:
        head = f"graph {self.graph} ({self.nodes} nodes): "
        outcome = self.outcome
        if isinstance(outcome, Pruned):
            return head + "\n".join(_pruned_lines(outcome))
        if isinstance(outcome, Declined):
            lines = [f"NOT pruned: {outcome.because}"]
            lines += [f"  where: {outcome.where}"] if outcome.where else []
            lines += [f"  try:   {outcome.advice}"] if outcome.advice else []
            return head + "\n".join(lines)
        return head + outcome.because


def _pruned_lines(p: Pruned) -> list[str]:
    saved = p.flops[0] / max(p.flops[1], 1)
    layers, retained = [
        ", ".join(str(getattr(c, name)) for c in p.cuts) for name in ("layer", "retained")
    ]
    lengths = [p.sequence[0], *(c.sequence[1] for c in p.cuts)]
    lines = [
        f"pruned before decoder layer {layers} of {p.stack}",
        f"  vision tokens: {p.vision_tokens} per sample ({p.how}), {retained} retained",
        f"  sequence:      {' -> '.join(map(str, lengths))} tokens, batch {p.batch}",
        f"  decoder FLOPs: {p.flops[0]:.4g} -> {p.flops[1]:.4g} ({saved:.2f}x fewer)",
    ]
    if p.kv_bytes[0]:
        lines.append(
            f"  KV cache:      {p.kv_bytes[0]:,} -> {p.kv_bytes[1]:,} bytes ({p.kv_layout})"
        )
    if p.order_mixing is not None:
        lines.append(f"  {p.order_mixing}; they run over the kept tokens, closed up")
    if (across := p.cuts[0].across) is not None:
        lines.append(f"  over {across.ranks} ranks:  {across.how}, process group {across.group!r}")
    cut = "cut" if len(p.cuts) == 1 else "first cut"
    lines.append(f"  crosses the {cut}, gathered once each ({len(p.crossings)} values):")
    for c in p.crossings:
        shape = ", ".join(c.shape)
        dims = ", ".join(map(str, c.dims))
        lines.append(f"    {c.name} [{shape}] along dim {dims}" + (f"  {c.where}" * bool(c.where)))
    return lines


def one_line(report: Report, pruned: Pruned) -> str:
    """What was pruned, for a log."""
    before, after = pruned.sequence
    layers = ",".join(str(cut.layer) for cut in pruned.cuts)
    flops = pruned.flops[0] / max(pruned.flops[1], 1)
    return (
        f"graph {report.graph}: {pruned.stack}.{layers}: {before} -> {after} tokens "
        f"({pruned.vision_tokens} -> {pruned.retained} vision tokens per sample, {pruned.how}), "
        f"{flops:.2f}x fewer decoder FLOPs, KV cache {pruned.kv_layout}, "
        f"passes {sum(pruned.seconds.values()):.2f} s"
    )


_LOCK = threading.Lock()
_REPORTS: list[Report] = []
_isolated: ContextVar[list[Report] | None] = ContextVar("dartfx_isolated_reports", default=None)
_collected: ContextVar[list[Report] | None] = ContextVar("dartfx_collected_reports", default=None)


def record(nodes: int, outcome: Outcome) -> Report:
    """Append one report, to the enclosing :func:`isolate_reports` list if there is one."""
    target = _target()
    with _LOCK:
        report = Report(target[-1].graph + 1 if target else 0, nodes, outcome)
        target.append(report)
        del target[:-MOST_REPORTS]
        if (collected := _collected.get()) is not None:
            collected.append(report)
    return report


def discard(report: Report) -> None:
    """Remove one report where it was recorded."""
    with _LOCK:
        for recorded in (_target(), _collected.get() or []):
            if report in recorded:
                recorded.remove(report)


def _target() -> list[Report]:
    isolated = _isolated.get()
    return _REPORTS if isolated is None else isolated


def isolate_reports() -> AbstractContextManager[list[Report]]:
    """Record the reports of this context here only, not in ``dartfx.reports()``."""
    return collecting(_isolated)


def collect_reports() -> AbstractContextManager[list[Report]]:
    """The reports made in this context, which are recorded as usual as well."""
    return collecting(_collected)


def reports() -> list[Report]:
    """The last 1000 graphs compiled since the last :func:`dartfx.reset`, oldest first."""
    with _LOCK:
        return list(_REPORTS)


def latest() -> int:
    """The number of the last graph reported; -1 without any."""
    with _LOCK:
        return _REPORTS[-1].graph if _REPORTS else -1


def since(graph: int) -> list[Report]:
    """The reports of the graphs after number ``graph``, of the last 1000."""
    return [made for made in reports() if made.graph > graph]


def clear() -> None:
    """Forget all reports."""
    with _LOCK:
        _REPORTS.clear()


# Keys of report.json that keep the name they have always had.
_KEYS = {"may_retry_with_graph_breaks": "broken_may_do"}


def as_json(report: Report, **more: object) -> str:
    """The report as JSON: its fields, with the outcome's kind under ``kind``, and ``more``."""
    names = [f.name for f in fields(report.outcome)]
    if isinstance(report.outcome, Pruned):
        names += ["layer", "vision_tokens", "retained", "sequence"]
    outcome = {_KEYS.get(name, name): getattr(report.outcome, name) for name in names}
    shown = {
        "graph": report.graph,
        "nodes": report.nodes,
        "kind": type(report.outcome).__name__.lower(),
        **outcome,
        "compile": asdict(report.compilation),
        **more,
    }
    return json.dumps(shown, indent=2, default=asdict) + "\n"
