"""The command line: ``python -m dartfx COMMAND``.

Each command is a module with ``configure(parser)`` and ``run(arguments) -> exit status``,
imported only when it is asked for, so that no command pays for what another needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

COMMANDS = {
    "bench": ("dartfx.tools.bench", "time what dartfx does on this machine"),
    "doctor": ("dartfx.cli.doctor", "check that dartfx can work on this machine"),
    "eval": ("dartfx.tools.evaluate", "measure what pruning costs in answers"),
    "explain": ("dartfx.cli.explain", "tell what would be pruned of a prompt, and why"),
    "families": ("dartfx.tools.zoo.command", "prune all families and compare with the oracle"),
    "show": ("dartfx.cli.show", "draw the kept vision tokens over their image"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for a wrong call as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m dartfx", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            chosen = import_module(module)
            chosen.configure(command)
            command.set_defaults(run=chosen.run)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))
