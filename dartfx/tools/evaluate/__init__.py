"""``python -m dartfx eval``: measures what pruning costs in answers, selector by selector.

A model answers questions about images unpruned, and then pruned by the backend with each requested
selector, number of retained tokens, layer and seed. Reported per type of question: accuracy, exact
agreement with the unpruned answers, and the divergence of the first answer token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dartfx.errors import InputError
from dartfx.integrations.outputs import check_file
from dartfx.selection.registry import BUILT_IN
from dartfx.tools.evaluate import selectors  # noqa: F401  (registers what dart is compared with)
from dartfx.tools.evaluate.answers import CALIBRATED, MERGED, Choice
from dartfx.tools.evaluate.downsample import DOWNSAMPLED
from dartfx.tools.evaluate.questions import load
from dartfx.tools.evaluate.results import Results, as_lines
from dartfx.tools.evaluate.scores import MEAN, score
from dartfx.tools.evaluate.work import Asker, Task, answers

__all__ = ["HELP", "configure", "run"]

HELP = "measure what pruning costs in answers"

DTYPES = ("float32", "bfloat16", "float16")
MODEL = Path("examples/tiny_vlm/model")
QUESTIONS = Path("examples/tiny_vlm/heldout/questions.jsonl")
QUICK = {"pictures": 12, "selectors": ["dart"], "retain": [576, 192, 0], "layers": [2]}
# Without the one that needs frames.
KNOWN = [n for n in BUILT_IN if n != "changed"] + ["key_norm", DOWNSAMPLED]
# DART first.
SELECTORS = [
    *("dart", "random", "uniform", "tiled", "fastv", "cover", "relevant", "spread"),
    *(f"dart{MERGED}", f"spread{MERGED}", f"uniform{MERGED}", DOWNSAMPLED),
]
# What --quick asserts.
_COST = 0.03  # accuracy that dart may lose on location with a third of the tokens


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--model", default=MODEL, help="folder or hub name (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--questions", type=Path, default=QUESTIONS, help="JSON Lines (default: %(default)s)")
    add("--pictures", type=int, help="only the first so many")
    add("--selectors", nargs="+", default=SELECTORS, help="the first is the one compared with")
    add("--retain", nargs="+", type=int, default=[576, 288, 192, 128, 64, 32, 16, 0])
    add("--layers", nargs="+", type=int, default=[2, 1, 3, 4], help="(default: %(default)s)")
    add(
        "--retain-elsewhere",
        nargs="+",
        type=int,
        default=[64, 16, 0],
        help="instead of --retain, at all layers but the first (default: %(default)s)",
    )
    add("--seeds", type=int, default=3, help="of selectors that draw (%(default)s)")
    add("--batch", type=int, default=32, help="prompts at once (%(default)s)")
    add("--max-new-tokens", type=int, default=8, help="of an answer (%(default)s)")
    add("--jobs", type=int, default=1, help="processes, each with the model (%(default)s)")
    add(
        "--from",
        dest="earlier",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="show what these measures, written by --json, found together, and measure nothing",
    )
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--write", type=Path, metavar="FILE", help="write the tables as Markdown")
    add("--plot", type=Path, metavar="FILE", help="draw accuracy over tokens; needs matplotlib")
    add("--quick", action="store_true", help="a small set, and only what must always hold")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns 1 if a check of ``--quick`` fails."""
    if arguments.quick:
        vars(arguments).update(QUICK)
    _check(arguments)
    results = _measured_before(arguments) if arguments.earlier else _measure(arguments)
    print(results.as_markdown())
    if arguments.plot:
        from dartfx.tools.evaluate.plot import draw

        draw(results, arguments.layers[0], arguments.plot)
    broken = list(_broken(results)) if arguments.quick else []
    for what in broken:
        print(f"BROKEN: {what}", file=sys.stderr)
    return 1 if broken else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError for an unusable argument before starting long work."""
    for name in ("json", "write", "plot"):
        check_file(name, getattr(arguments, name))
    if not arguments.questions.is_file():
        why = f"no questions at {arguments.questions}: name a file, or run from a checkout"
        raise InputError("questions", why)
    unknown = {name for name in arguments.selectors if Choice(name, 0, 0).name not in KNOWN}
    if unknown:
        known = ", ".join([*KNOWN, f"and each with {MERGED}, {CALIBRATED} or {MERGED}{CALIBRATED}"])
        why = f"unknown: {', '.join(sorted(unknown))}; registered: {known}"
        raise InputError("selectors", why)
    if arguments.plot and find_spec("matplotlib") is None:
        raise InputError("plot", "matplotlib is missing: pip install 'dartfx[eval]'")


def _measured_before(arguments: argparse.Namespace) -> Results:
    questions = load(arguments.questions, arguments.pictures)
    entries = []
    for path in arguments.earlier:
        try:
            entries.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError("from", f"cannot read {str(path)!r}: {error}") from error
    results = Results.of_json(questions, entries)
    _write(arguments, results)
    return results


def _measure(arguments: argparse.Namespace) -> Results:
    asker = Asker(arguments)
    questions, full = asker.questions, asker.full()
    unpruned = score(questions, full, full)["accuracy"]
    results = Results(questions, asker.vision_tokens, unpruned)
    plan = list(_plan(arguments, results.vision_tokens))
    start = time.monotonic()
    for number, made in enumerate(answers(asker, arguments, plan), 1):
        layer, choices = plan[number - 1]
        retain = choices[0].retain
        for one, answered in zip(choices, made, strict=True):
            key = (layer, one.selector, one.retain)
            results.add(key, one.seed, score(questions, full, answered))
            if answered.tokens is not None:
                results.tokens[key] = answered.tokens
        accuracies = ", ".join(
            f"{name} {results.figures((layer, name, retain), 'accuracy')[MEAN].value:.1%}"
            for name in dict.fromkeys(one.selector for one in choices)
        )
        print(
            f"[{number}/{len(plan)}] layer {layer}, {retain} kept: {accuracies} "
            f"(after {time.monotonic() - start:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
        _write(arguments, results)  # each time, so that results survive an interruption
    return results


def _plan(arguments: argparse.Namespace, total: int) -> Iterator[Task]:
    """Yield every layer and number of tokens with its choices.

    Where all or no tokens are kept, one selector represents all.  These settings come first at each
    layer: if keeping no token loses nothing, there is nothing to compare.
    """
    for layer in arguments.layers:
        first = layer == arguments.layers[0]
        retained = arguments.retain if first else arguments.retain_elsewhere
        for retain in sorted(retained, key=lambda r: 0 < r < total):
            decided = 0 < retain < total
            names = arguments.selectors if decided else arguments.selectors[:1]
            seeds = {name: arguments.seeds if decided and name == "random" else 1 for name in names}
            yield layer, tuple(Choice(n, retain, s) for n in names for s in range(seeds[n]))


def _write(arguments: argparse.Namespace, results: Results) -> None:
    if arguments.json:
        arguments.json.write_text(as_lines(results.as_json()))
    if arguments.write:
        arguments.write.write_text(results.as_markdown())


def _broken(results: Results) -> Iterator[str]:
    """Yield the sanity checks that the results fail."""
    full = results.sample.figures(results.full)
    for key in results.values:
        accuracy = results.figures(key, "accuracy")
        if key[2] >= results.vision_tokens:
            if (results.mean(key, "agreement") != 1).any():
                yield f"{key}: nothing was dropped, but some answers changed"
            if results.mean(key, "kl").max() > 1e-6:
                yield f"{key}: nothing was dropped, but distributions changed"
        elif key[2] == 0:
            if key in results.void():
                yield f"{key}: {accuracy[MEAN].value:.1%} right without one vision token"
        else:
            kept, all_kept = accuracy["location"].value, full["location"].value
            if kept < all_kept - _COST:
                yield f"{key}: location {kept:.1%}, unpruned {all_kept:.1%}"
