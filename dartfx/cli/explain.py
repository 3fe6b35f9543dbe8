"""``python -m dartfx explain``: what would be pruned of one prompt, and why or why not."""

from __future__ import annotations

import argparse
import sys

import dartfx
from dartfx.integrations.hf import CommandError, add_arguments, load, options

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_arguments(parser)
    parser.add_argument("--dump", help="directory for graphs, report.html and repro.py")
    parser.add_argument("--tokens", action="store_true", help="tell the kept tokens, too")
    parser.add_argument(
        "--forward", action="store_true", help="a plain forward call instead of generate"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; 1 when nothing would be pruned, 2 when there is nothing to explain."""
    try:
        model, inputs = load(arguments)
        given = options(arguments) | ({"dump": arguments.dump} if arguments.dump else {})
        target = model if arguments.forward else model.generate
        once = {} if arguments.forward else {"max_new_tokens": 1, "do_sample": False}
        explanation = dartfx.explain(
            target, options=given, tokens=arguments.tokens, **inputs, **once
        )
    except (CommandError, dartfx.ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(explanation)
    return 0 if explanation.pruned else 1
