"""``python -m dartfx bench WHAT``: times on this machine."""

from __future__ import annotations

import argparse
from importlib import import_module

__all__ = ["HELP", "configure", "run"]

HELP = "time what dartfx does on this machine"

BENCHMARKS = {
    "generate": "dartfx.tools.bench.generate.command",
    "kernel": "dartfx.tools.bench.kernel",
    "ranks": "dartfx.tools.bench.ranks",
    "serve": "dartfx.tools.bench.serve",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """One sub-command per benchmark: a module with HELP, ``configure`` and ``run``."""
    choices = parser.add_subparsers(metavar="WHAT", required=True)
    for name, path in BENCHMARKS.items():
        module = import_module(path)
        chosen = choices.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(chosen)
        chosen.set_defaults(benchmark=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen benchmark; returns its exit status."""
    return int(arguments.benchmark(arguments))
