"""The arguments of ``bench generate``, and their validation."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from dartfx.errors import InputError
from dartfx.integrations.hf import read_image
from dartfx.integrations.outputs import check_file

__all__ = ["SHAPES", "check", "configure"]

SHAPES = "dartfx.tools.zoo.shapes"  # by name, since nothing but the zoo imports what names models
_COUNTS = ("repeat", "warmup", "batch", "images", "turns")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model-shape", metavar="SHAPE", help="random weights, real shapes")
    models.add_argument("--model", metavar="CHECKPOINT", help="a folder or a name on the hub")
    add("--image", type=Path, metavar="FILE", help="for --model (default: noise, 672 x 672)")
    add("--prompt", help="for --model (default: a request to describe the image)")
    add("--retain-tokens", type=int, help="vision tokens kept (default: the shape's; see docs)")
    add("--batch", type=int, default=1, help="prompts in a call, all alike (%(default)s)")
    add("--images", type=int, default=1, help="images in a prompt, all alike (%(default)s)")
    add("--dynamic", action="store_true", help="compile for all lengths from the first call on")
    add("--layer", type=int, default=2, help="first layer that sees them only (%(default)s)")
    add("--new-tokens", nargs="+", type=int, help="1 8 64 256; on a CPU 1 8; 1 is always added")
    add("--turns", type=int, default=1, help="also later turns of a conversation (%(default)s)")
    add("--rows", nargs="+", metavar="ROW", help="eager hooks plain dart ..._static (those)")
    add("--repeat", type=int, default=5, help="timed calls of each (%(default)s)")
    add("--warmup", type=int, default=2, help="calls of each before that (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="float32; on CUDA bfloat16")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--lowering", choices=("inductor", "aot_eager", "eager"), default="inductor")
    add("--json", type=Path, metavar="FILE", help="write all figures there, round by round")
    add("--gate", type=Path, metavar="FILE", help="time alone among benches of the same FILE")
    add("--profile", action="store_true", help="also the kernels of one token (CUDA)")
    add("--plot", type=Path, metavar="FILE", help="draw the totals; needs matplotlib")


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for an argument that cannot be used, before any long step."""
    if find_spec("transformers") is None:
        raise InputError("model", "transformers is missing: pip install 'dartfx[hf]'")
    shapes = import_module(SHAPES).SHAPES
    if arguments.model_shape and arguments.model_shape not in shapes:
        why = f"unknown shape {arguments.model_shape!r}; known: {', '.join(shapes)}"
        raise InputError("model-shape", why)
    if arguments.plot and find_spec("matplotlib") is None:
        raise InputError("plot", "matplotlib is missing: pip install matplotlib")
    if arguments.profile and not arguments.device.startswith("cuda"):
        raise InputError("profile", "counts kernels of a GPU: --device cuda")
    for name in _COUNTS:
        if getattr(arguments, name) < 1:
            raise InputError(name, "must be at least 1")
    if arguments.new_tokens and min(arguments.new_tokens) < 1:
        raise InputError("new-tokens", "must be at least 1")
    if arguments.turns > 1 and arguments.new_tokens and max(arguments.new_tokens) < 2:
        raise InputError("turns", "needs answers of two tokens or more: --new-tokens 8")
    for name in ("batch", "images"):
        if arguments.model and getattr(arguments, name) > 1:
            raise InputError(name, "is for --model-shape")
    from dartfx.tools.bench.generate.variants import VARIANTS

    rows = arguments.rows or VARIANTS
    for row in rows:
        if row not in VARIANTS:
            raise InputError("rows", f"unknown row {row!r}; known: {', '.join(VARIANTS)}")
    if arguments.turns > 1 and not {"plain", "dart"} & set(rows):
        raise InputError("turns", "needs the row plain or dart: --rows plain dart")
    for name in ("json", "gate", "plot"):
        check_file(name, getattr(arguments, name))
    if arguments.image:
        read_image(arguments.image)
