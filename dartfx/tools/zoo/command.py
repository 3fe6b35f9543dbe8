"""``python -m dartfx families``: compiles every family and tabulates the results."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import dartfx
from dartfx.integrations.outputs import check_file, check_folder
from dartfx.tools.zoo.measure import CALLS, RETAIN, Call, Result, measure
from dartfx.tools.zoo.registry import FAMILIES, missing_classes

HELP = "prune every model family and hold it against the oracle"

_NOTES = """\
Each family is the untouched Hugging Face model, built from a tiny configuration with the structure
of the real one and random weights. `one` is a forward of one prompt without a mask through
`torch.compile(model, backend="dart")`; `pad2` a forward of two prompts, padded on the left, through
`dartfx.compile`; `generate` writes eight tokens through `dartfx.compile`. Each is compared with the
eager model pruned by forward hooks with a float64 selection, or, where dartfx refused, with the
unpruned model: the number is the largest difference of any logit, which are of order 1.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--new",
        action="store_true",
        help="print the vision-language classes of this transformers that no family covers",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a Markdown page")
    parser.add_argument("--lowering", choices=["eager", "inductor"], default="eager")
    parser.add_argument("--quick", action="store_true", help="only generate, two tokens")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="write tracebacks of errors")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns 1 if any family is wrong, crashes or silently runs unpruned."""
    if arguments.list:
        print("\n".join(FAMILIES))
        return 0
    if arguments.new:
        print("\n".join(f"{kind:24} {name}" for kind, name in missing_classes().items()))
        return 0
    names = arguments.names or list(FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; --list prints the families", file=sys.stderr)
        return 2
    for name in ("json", "write"):
        check_file(name, getattr(arguments, name))
    check_folder("traces", arguments.traces)
    torch.set_num_threads(1)  # the models are too small for a second thread to help
    results = []
    calls, steps = (["generate"], 2) if arguments.quick else (CALLS, 8)
    for number, name in enumerate(names, 1):
        about = (FAMILIES[name].__doc__ or "").split("\n")[0].rstrip(".")
        result = measure(name, about, lowering=arguments.lowering, calls=calls, steps=steps)
        print(
            f"[{number}/{len(names)}] {name}: {result.status} ({result.seconds:.1f} s)",
            file=sys.stderr,
            flush=True,
        )
        results.append(result)
        _write_outputs(arguments, results)
    print(as_text(results))
    return 0 if all(result.good for result in results) else 1


def _write_outputs(arguments: argparse.Namespace, results: Sequence[Result]) -> None:
    """Write after every family, so that results survive an interruption."""
    if arguments.json:
        found = {"versions": versions(), "families": [r.as_json() for r in results]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.write:
        arguments.write.write_text(as_markdown(results, arguments.lowering))
    if arguments.traces:
        arguments.traces.mkdir(parents=True, exist_ok=True)
        for result in results[-1:]:
            traces = [f"{k}\n{c.trace}" for k, c in result.calls.items() if c.trace]
            path = arguments.traces / f"{result.name}.txt"
            path.unlink(missing_ok=True)
            if traces:
                path.write_text("\n".join(traces))


def versions() -> dict[str, str]:
    """The versions that the table was made with."""
    return {
        "dartfx": dartfx.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def counts(results: Sequence[Result]) -> str:
    """Count the families per status."""
    found = [result.status for result in results]
    each = (f"{found.count(s)} {s}" for s in dict.fromkeys(sorted(found)))
    return f"{len(results)} families: {', '.join(each)}"


def _cell(call: Call | None) -> str:
    if call is None:
        return "-"
    if call.difference is None:
        return call.status
    return f"{call.status} {call.difference:.0e}" if call.difference else f"{call.status} exact"


def _why(result: Result) -> list[str]:
    """Each reason once, with the calls it applies to."""
    reasons: dict[str, list[str]] = {}
    for name, call in result.calls.items():
        if call.why:
            where = f" (at {_short(call.where)})" if call.where else ""
            advice = f"; try: {call.advice}" if call.advice else ""
            reasons.setdefault(call.why + where + advice, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _short(where: str) -> str:
    """A source line without the folder of installed packages."""
    return where.rpartition("site-packages/")[2]


def _how(result: Result) -> str:
    """The sources of the vision mask in all pruned calls."""
    return "; ".join(dict.fromkeys(call.how for call in result.calls.values() if call.how))


def _crossings(result: Result) -> tuple[str, ...]:
    """What crossed the cut, for the call with the most crossings."""
    return max((call.crossings for call in result.calls.values()), key=len)


def as_text(results: Sequence[Result]) -> str:
    """The table for a terminal."""
    head = f"{'family':22} {'status':9} {'one':16} {'pad2':16} {'generate':16} graphs  mask from"
    lines = [head]
    for result in results:
        cells = [_cell(result.calls.get(name)) for name in ("one", "pad2", "generate")]
        graphs = "/".join(str(call.graphs) for call in result.calls.values())
        lines.append(
            f"{result.name:22} {result.status:9} {cells[0]:16} {cells[1]:16} {cells[2]:16} "
            f"{graphs:7} {_how(result)}"
        )
        lines += [f"    {why}" for why in _why(result)]
    return "\n".join([*lines, counts(results)])


def as_markdown(results: Sequence[Result], lowering: str) -> str:
    """The page for docs/."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    date = datetime.date.today().isoformat()
    lines = [
        "# Model families",
        "",
        f"Written by `python -m dartfx families --write docs/families.md` on {date} with {made}; "
        f"lowering {lowering}, {RETAIN} vision tokens retained.",
        "",
        _NOTES,
        f"**{counts(results)}.**",
        "",
        "| family | what is special | status | one | pad2 | generate | graphs | mask from | "
        "gathered at the cut |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [_cell(result.calls.get(name)) for name in ("one", "pad2", "generate")]
        graphs = " / ".join(str(call.graphs) for call in result.calls.values())
        special = (result.about.partition(": ")[2] or result.about).replace("``", "`")
        lines.append(
            f"| {result.name} | {special} | {result.status} | {' | '.join(cells)} | {graphs} | "
            f"{_how(result)} | {'<br>'.join(_crossings(result))} |"
        )
    reasons = [(r.name, why) for r in results for why in _why(r)]
    if reasons:
        lines += ["", "## Reasons", ""]
        lines += [f"- **{name}**, {why}" for name, why in reasons]
    return "\n".join(lines) + "\n"
