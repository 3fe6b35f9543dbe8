"""Observes a graph after each pass and renders ``report.html``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
from torch.fx import GraphModule, Node

from dartfx.observe.html.changes import Change, change, operator
from dartfx.observe.html.drawing import Drawing
from dartfx.observe.html.kernels import kernels
from dartfx.observe.html.lineage import Link, Recorded, lineage
from dartfx.observe.html.module_tree import module_tree
from dartfx.observe.html.structure import Part, main_path, most_common, parts, quotient
from dartfx.observe.html.templating import render
from dartfx.observe.html.values import Value, lines, outputs, values
from dartfx.observe.kept import grids
from dartfx.observe.report import Report
from dartfx.passes.analysis.kv_caches import kv_caches
from dartfx.passes.analysis.locate import find_stacks
from dartfx.passes.analysis.token_axes import TokenAxes, infer_axes
from dartfx.passes.outcome import Crossing, Pruned, Unchanged
from dartfx.passes.refusal import Declined
from dartfx.passes.site import Site

__all__ = ["Page"]

CUT = "the cut"


class Stage(NamedTuple):
    """The graph after one pass: the dump's file of it, its lines of code, its operators."""

    name: str
    file: str
    lines: dict[str, str]
    calls: list[str]


class Page:
    """Observes one graph after each pass; :meth:`html` then renders it."""

    def __init__(self) -> None:
        self._before: dict[str, Value] = {}
        self._after: dict[str, Value] = {}
        self._parts: dict[str, Part] = {}
        self._links: dict[str, list[Link]] = {}
        self._hidden = ""
        self._cached: dict[int, int] = {}  # which output is a KV cache of which layer
        self._stack = ""
        self._sizes: list[list[int]] = []
        self._stages: list[Stage] = []

    def __call__(
        self, name: str, module: GraphModule, site: Site | None, text: str, file: str
    ) -> None:
        """The graph after the pass ``name``; text: as rendered; file: the dump's file of it."""
        if name == "normalise":
            self._stages = []
        code = lines(text)
        stage = Stage(name, file, code, [_called(node, code) for node in module.graph.nodes])
        self._stages.append(stage)
        if name == "normalise":
            self._before, self._after, self._links = values(module, stage.lines), {}, {}
            self._parts = parts(self._before, find_stacks(module.graph))
            self._sizes = [[_size(self._before, n) for n in outputs(module)]]
        elif name == "locate" and site is not None:
            axes = Recorded()
            infer_axes(module.graph, axes)
            self._links = lineage(module.graph, site, axes)
            self._hidden, self._stack = site.hidden.name, site.stack.path
            returned = outputs(module)
            (output,) = (n for n in module.graph.nodes if n.op == "output")
            layers = kv_caches(site, output.all_input_nodes, TokenAxes(axes, site))
            self._cached = {i: layers[n] for i, n in enumerate(returned) if n in layers}
        elif name.startswith("check"):  # once for every cut; the last one counts
            self._after = values(module, stage.lines)
            self._sizes = [self._sizes[0], [_size(self._after, n) for n in outputs(module)]]

    def html(
        self,
        report: Report,
        files: Sequence[str],
        output_code: Sequence[str],
        index: str = "",
        kept: dict[str, Any] | None = None,
    ) -> str:
        """The page of one graph: everything that was observed, and its outcome.

        files: names of the dump's other files, which the page links to; output_code: Inductor's;
        index: where the page of all graphs is; kept: kept.json.
        """
        after = self._after if report.pruned else {}
        found = self._measured(after)
        order = quotient(self._before, found)
        way = main_path(order, found)
        made = report.outcome.cuts if isinstance(report.outcome, Pruned) else ()
        cuts = [f"{self._stack}.{cut.layer}" for cut in made]
        return render(
            "report.html.jinja",
            report=report,
            kind=type(report.outcome).__name__.lower(),
            warnings=list(_warnings(report)),
            files=files,
            index=index,
            grids=list(grids(kept)),
            output_code=output_code,
            parts=list(found.values()),
            total=_total(found.values()),
            drawing=Drawing([found[p] for p in way], found, order, cuts) if found else None,
            crossings=list(self._crossings(report, found)),
            graph=self._graph(found, after, output_code),
            changes=list(self._changes(report)),
            tree=module_tree(self._before, after),
        )

    def counts(self) -> dict[str, Any]:
        """The last graph's calls by operator, and its collectives in order, for report.json."""
        calls = [call for call in self._stages[-1].calls if call] if self._stages else []
        collectives = [call for call in calls if "c10d" in call]
        return {"operators": dict(sorted(Counter(calls).items())), "collectives": collectives}

    def _changes(self, report: Report) -> Iterator[Change]:
        """What each pass did to the graph, from the first that dartfx made."""
        outcome = report.outcome
        seconds = outcome.seconds if isinstance(outcome, Pruned) else {}
        stages = [stage for stage in self._stages if stage.name not in ("dynamo", "exported")]
        for one, other in itertools.pairwise(stages):
            taken = seconds.get(other.name)
            yield change(other.name, other.file, taken, one.lines, other.lines)

    def _measured(self, after: Mapping[str, Value]) -> dict[str, Part]:
        """The parts with their costs before and after; without an after, that is as before."""
        shown, sizes = after or self._before, self._sizes
        for part in self._parts.values():
            old = [self._before[n] for n in part.names]
            new = [shown[n] for n in part.names if n in shown]
            part.length = self._length(old), self._length(new)
            part.flops = sum(v.flops for v in old), sum(v.flops for v in new)
            part.held = sum(v.held for v in old), sum(v.held for v in new)
            if part.stack == self._stack:
                numbers = [i for i, layer in self._cached.items() if layer == part.layer]
                one, other = sizes[0], sizes[-1] if after else sizes[0]
                part.cached = sum(one[i] for i in numbers), sum(other[i] for i in numbers)
        return self._parts

    def _length(self, found: Sequence[Value]) -> int:
        """How many tokens a part's values hold; positions of its own where they are not ours."""
        sized = [v for v in found if v.floating and v.shape is not None]
        ours = [
            v.shape[dim]
            for v in sized
            if v.shape is not None
            for dim, *_ in self._links.get(v.name, ())
        ]
        rows = [v.shape[-2] for v in sized if v.shape is not None and len(v.shape) in (2, 3)]
        return most_common(ours) or most_common(rows)

    def _crossings(
        self, report: Report, found: Mapping[str, Part]
    ) -> Iterator[tuple[Crossing, str, list[str]]]:
        """Each value gathered at the cut, the part it comes from and the parts that read it."""
        if not isinstance(report.outcome, Pruned):
            return
        part_of = {name: part.label for part in found.values() for name in part.names}
        graph = nx.DiGraph((o, v.name) for v in self._before.values() for o in v.operands)
        region = nx.descendants(graph, self._hidden)
        for crossing in report.outcome.crossings:
            readers: list[str] = []
            for user in graph.successors(crossing.name) if crossing.name in graph else ():
                # A table that every layer views is gathered once; the views are computed again.
                readers += [user] if user in region else graph.successors(user)
            labels = [part_of[r] for r in readers if r in region and r in part_of]
            yield crossing, part_of.get(crossing.name, "inputs"), list(dict.fromkeys(labels))

    def _graph(
        self,
        found: Mapping[str, Part],
        after: Mapping[str, Value],
        output_code: Sequence[str],
    ) -> dict[str, Any]:
        """Every value by number, for the page's script: code, source, operands and lineage.

        output_code: names the kernels.
        """
        number = {name: i for i, name in enumerate({**after, **self._before})}
        labels = [part.path for part in found.values()] + [CUT]
        part_of = {n: i for i, part in enumerate(found.values()) for n in part.names}
        sources, computed_by = {"": 0}, kernels(output_code)
        rows = []
        for name in number:
            one, other = self._before.get(name), after.get(name)
            value = other or one
            assert value is not None
            in_part = -1 if value.op in ("placeholder", "output") else part_of.get(name, -2)
            rows.append(
                [
                    name,
                    len(labels) - 1 if in_part == -2 else in_part,
                    one.code if one is not None else None,
                    other.code if other is not None else None,
                    sources.setdefault(value.source, len(sources)),
                    [number[o] for o in value.operands],
                ]
            )
        return {
            "parts": labels,
            "sources": list(sources),
            "values": rows,
            "links": self._numbered_links(number),
            "compared": bool(after),
            "kernels": {number[n]: names for n, names in computed_by.items() if n in number},
            "output_code": bool(output_code),
        }

    def _numbered_links(self, number: Mapping[str, int]) -> dict[int, list[list[int]]]:
        return {
            number[name]: [[dim, number.get(o, -1), d, number.get(u, -1)] for dim, o, d, u in link]
            for name, link in self._links.items()
        }


def _called(node: Node, code: Mapping[str, str]) -> str:
    """The operator that a node calls; "" for inputs and outputs."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op != "call_function":
        return ""
    found = operator(code.get(node.name, ""))
    # Dynamo's graph has lines like ``a + b``, too.
    return found if "." in found else str(getattr(node.target, "__name__", node.target))


def _size(found: Mapping[str, Value], node: Any) -> int:
    return found[node.name].size if node is not None else 0


def _total(found: Any) -> Part:
    total = Part("all")
    for name in ("flops", "held", "cached"):
        pairs = [getattr(part, name) for part in found]
        setattr(total, name, (sum(p[0] for p in pairs), sum(p[1] for p in pairs)))
    return total


def _warnings(report: Report) -> Iterator[str]:
    """The warnings at the top of the page when not everything was pruned."""
    outcome = report.outcome
    if isinstance(outcome, Declined):
        yield f"NOT pruned: {outcome.because}"
        if outcome.where:
            yield f"where: {outcome.where}"
        if outcome.advice:
            yield f"try: {outcome.advice}"
    elif isinstance(outcome, Unchanged) and (outcome.all_retained or outcome.unsure):
        yield outcome.because
