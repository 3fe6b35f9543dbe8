"""``python -m dartfx explain``: what would be pruned of one prompt, and why or why not."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import dartfx
from dartfx.cli.arguments import add_model, load, options
from dartfx.integrations.hf import quiet_dynamo
from dartfx.integrations.outputs import check_folder
from dartfx.model.explain import Explanation
from dartfx.observe.dumped import graphs
from dartfx.observe.kept import add_picture

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_model(parser)
    parser.add_argument("--dump", help="directory for graphs, report.html and repro.py")
    parser.add_argument("--tokens", action="store_true", help="show the kept tokens, too")
    parser.add_argument(
        "--forward", action="store_true", help="a plain forward call instead of generate"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; 1 when nothing would be pruned.  Raises InputError."""
    check_folder("dump", arguments.dump)
    model, inputs = load(arguments)
    given = options(arguments) | ({"dump": arguments.dump} if arguments.dump else {})
    target = model if arguments.forward else model.generate
    once = {} if arguments.forward else {"max_new_tokens": 1, "do_sample": False}
    quiet_dynamo()
    explanation = dartfx.explain(target, options=given, tokens=arguments.tokens, **inputs, **once)
    print(explanation)
    if arguments.dump and arguments.tokens:
        _draw(arguments, explanation)
    return 0 if explanation.pruned else 1


def _draw(arguments: argparse.Namespace, explanation: Explanation) -> None:
    """Draw the kept tokens over the image in the report of the graph that pruned them."""
    pruned = [graph for graph in graphs(Path(arguments.dump))[0] if graph.kind == "pruned"]
    if not pruned or not explanation.tokens or explanation.tokens[0].layout is None:
        return
    png = io.BytesIO()
    dartfx.overlay(arguments.image, explanation.tokens[0]).save(png, "PNG")
    add_picture(pruned[0].folder, png.getvalue())
