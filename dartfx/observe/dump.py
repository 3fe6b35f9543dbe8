"""Graph dumps: one folder per graph, a numbered file after every pass, a report and a repro.

How the folders are named and what else is in them: :mod:`dartfx.observe.folders`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from dartfx import compat
from dartfx._version import __version__
from dartfx.config.options import DartConfig
from dartfx.observe import folders, repro_inputs, repro_script
from dartfx.observe.kept import kept_rows
from dartfx.observe.report import Report, as_json
from dartfx.observe.repro_script import changed_options
from dartfx.passes.graph import hint, render, sizes, tensor
from dartfx.passes.site import Site
from dartfx.runtime.keep_idx import KeepIdxRecord

if TYPE_CHECKING:
    from dartfx.observe.html.page import Page

__all__ = ["Dump", "ExportDump"]

log = logging.getLogger(__name__)

# tlparse shows the graph before the first pass and after the last one (of each cut).
_TRACED = {"normalise": "dartfx_graph_before", "check": "dartfx_graph_after"}


class Dump:
    """Writes one graph's stages to the ``dump`` directory and to TORCH_TRACE, if set.

    caller: what the caller of the compiled code does, for ``repro.py``.
    """

    first = "dynamo"  # who made the graph

    def __init__(
        self, config: DartConfig, module: GraphModule, caller: Mapping[str, bool] | None = None
    ) -> None:
        self._config, self._module, self._caller = config, module, caller or {}
        self._folder = None if config.dump is None else folders.new_folder(Path(config.dump))
        self._page = None if self._folder is None else _new_page()
        self._step = itertools.count()
        self._mask: repro_script.RecordedMask | None = None
        self._report: Report | None = None
        self._output_code: list[str] = []
        self._compilation: dict[str, Any] = {}
        if self._folder is not None:
            made_by = {"dartfx": __version__, "torch": str(torch.__version__)}
            options = {k: str(v) for k, v in changed_options(config).items()}
            self._compilation = folders.describe(module)
            self._compilation |= {"versions": made_by, "options": options}
        self._save_compilation()
        self(self.first, module)

    def __call__(self, name: str, module: GraphModule, site: Site | None = None, /) -> None:
        """The graph after the pass ``name``; site: where it is cut, once that is known."""
        traced = _TRACED.get(name.partition(" ")[0])
        if traced is not None:
            _trace(traced, "string", lambda: render(module))
        if self._folder is None or self._page is None:
            return
        file = f"{next(self._step):02d}_{name.replace(' ', '_')}.txt"
        text = render(module)
        if _wants(self._config.dump_passes, name):
            (self._folder / file).write_text(text)
        self._page(name, module, site, text, file)
        if name in ("normalise", "locate"):
            self._mask = _recorded_mask(self._module, module, site) or self._mask

    def save_inputs(self, inputs: Sequence[Any]) -> None:
        """Save the integer and bool inputs of the call that is being compiled, for the repro."""
        if self._folder is None:
            return
        try:
            repro_inputs.save(self._module, inputs, self._folder)
        except compat.Unavailable as error:
            log.warning("no %s in %s: %s", repro_inputs.FILE, self._folder, error)

    def finish(self, report: Report) -> None:
        """Write the outcome, for people (``report.txt``) and programs (``report.json``)."""
        _trace("dartfx_report", "json", lambda: as_json(report))
        self._report = report
        if self._folder is None:
            return
        if not _wants(self._config.dump_graphs, self._described(report)):
            folders.remove(self._folder)
            self._folder = self._page = None
            return
        self._write_repro(self._folder)
        self._write_report()

    def _described(self, report: Report) -> str:
        """The line that the option dump_graphs is matched against."""
        assert self._folder is not None
        kind, where = type(report.outcome).__name__.lower(), self._compilation["where"]
        return f"{self._folder.name} {kind} {where}"

    def note_kept(self, record: KeepIdxRecord) -> None:
        """Save which tokens the first call of a pruned graph kept."""
        if self._folder is None or record.vision_mask is None:
            return
        folders.write_json(self._folder / folders.KEPT, kept_rows(record))
        self._write_report()

    def abandon(self, why: str) -> None:
        """Mark the graph as unused; why: for the index, which still lists it."""
        self._compilation["abandoned"] = why
        self._save_compilation()
        self._write_index()

    def note_output_code(self, files: Sequence[str]) -> None:
        """Add the files of Inductor's code to the report."""
        self._output_code += files
        self._write_report()

    def _save_compilation(self) -> None:
        if self._folder is not None:
            folders.write_json(self._folder / folders.COMPILATION, self._compilation)

    def _write_index(self) -> None:
        if self._config.dump is None:
            return
        try:
            _write_index(Path(self._config.dump))
        except Exception as error:  # it reads what others write, and must not end a compilation
            log.warning("no index.html in %s: %s", self._config.dump, error)

    def _write_repro(self, folder: Path) -> None:
        try:
            written = repro_script.script(self._config, self._module, self._caller, self._mask)
        except compat.Unavailable as error:
            log.warning("no repro.py in %s: %s", folder, error)
            return
        (folder / "repro.py").write_text(written)

    def _write_report(self) -> None:
        if self._folder is None or self._page is None or self._report is None:
            return
        code = "".join(f"Inductor's code: {path}\n" for path in self._output_code)
        (self._folder / "report.txt").write_text(f"{self._report}\n{code}")
        written = as_json(self._report, output_code=self._output_code, **self._page.counts())
        folders.write(self._folder / "report.json", written)
        files = sorted(f.name for f in self._folder.iterdir() if f.name != "report.html")
        assert self._config.dump is not None
        up = Path(*[".."] * len(self._folder.relative_to(self._config.dump).parts), "index.html")
        kept = folders.read_json(self._folder / folders.KEPT)
        page = self._page.html(self._report, files, self._output_code, up.as_posix(), kept)
        (self._folder / "report.html").write_text(page)
        self._write_index()


class ExportDump(Dump):
    """The stages of an exported program, which is its own repro: ``torch.export.save`` it."""

    first = "exported"

    def _write_repro(self, folder: Path) -> None:
        pass


def _trace(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured = compat.find("trace_structured")
    if trace_structured is None:
        return
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        # A graph that waits for its mask is rewritten at run time, when nothing is being compiled.
        expect_trace_id=False,
    )


def _recorded_mask(
    dynamo: GraphModule, normalised: GraphModule, site: Site | None
) -> repro_script.RecordedMask | None:
    """The graph's incoming vision mask, if any: two inputs in front of dynamo's own."""
    inputs = [n for n in normalised.graph.nodes if n.op == "placeholder"]
    own = sum(n.op == "placeholder" for n in dynamo.graph.nodes)
    if len(inputs) != own + 2:
        return None
    mask, row_count = inputs[:2]
    rows = hint(sizes(row_count)[0])
    if site is not None and site.vision.how != "given":
        return repro_script.RecordedMask(inputs.index(site.vision.embeds) - 2, rows, given=False)
    shape = repro_inputs.sized(sizes(mask))
    for number, node in enumerate(inputs[2:]):
        value = tensor(node)
        fits = value is not None and value.ndim in (2, 3) and repro_inputs.sized(value.shape)
        if fits and fits[:2] == shape:
            return repro_script.RecordedMask(number, rows, given=True)
    return None


def _wants(pattern: str | None, name: str) -> bool:
    """Whether this passes a filter; without one everything does."""
    return pattern is None or re.search(pattern, name) is not None


def _new_page() -> Page:
    # Only a dump needs the page's libraries, whose import takes longer than the rest of dartfx's.
    from dartfx.observe.html.page import Page

    return Page()


def _write_index(directory: Path) -> None:
    from dartfx.observe.html.index import write_index

    write_index(directory)
