"""The command line: ``dartfx COMMAND``, or ``python -m dartfx COMMAND``.

Each command is a module with ``configure(parser)`` and ``run(arguments) -> exit status``, imported
only when it is called, so that no command pays for what another needs.  What it raises for an
argument that cannot be used is printed in one line here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dartfx.errors import ConfigError, InputError

__all__ = ["main"]

COMMANDS = {
    "bench": ("dartfx.tools.bench", "time what dartfx does on this machine"),
    "diff": ("dartfx.cli.diff", "compare dumps: selectors, budgets, versions, ranks"),
    "doctor": ("dartfx.cli.doctor", "check that dartfx can work on this machine"),
    "eval": ("dartfx.tools.evaluate", "measure what pruning costs in accuracy"),
    "explain": ("dartfx.cli.explain", "show what would be pruned of a prompt, and why"),
    "families": ("dartfx.tools.zoo.command", "prune all families and compare with the oracle"),
    "profile": ("dartfx.cli.profile", "time each region of a pruned graph next to its FLOPs"),
    "show": ("dartfx.cli.show", "draw the kept vision tokens over their image"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for invalid arguments as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0]).name == "dartfx"
    parser = argparse.ArgumentParser(
        prog="dartfx" if script else "python -m dartfx",
        description="Prune vision tokens with DART.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            chosen = import_module(module)
            chosen.configure(command)
            command.set_defaults(run=chosen.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        # A positional argument is named by its metavar.
        name = error.argument if error.argument.isupper() else f"--{error.argument}"
        print(f"error: argument {name}: {error}", file=sys.stderr)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2
