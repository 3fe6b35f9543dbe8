"""The arguments that commands share: model, image, prompt and options."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from dartfx.integrations import hf

__all__ = ["add_model", "load", "options"]

DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add arguments for the model, image, question and options.

    required: whether a command needs the model and the image.
    """
    add = parser.add_argument
    add(
        "--model",
        required=required,
        help="a vision-language model on the Hugging Face hub or a folder",
    )
    add("--image", required=required, help="an image file")
    add(
        "--prompt",
        default="What is shown in this image?",
        help="the question; with the image token in it, the whole prompt (%(default)s)",
    )
    add("--retain-tokens", type=int, help="vision tokens kept per sample (default: the options')")
    add("--layer", type=int, default=2, help="first layer that sees the pruned sequence")
    add("--selector", default="dart", help="which rule picks the tokens (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")


def options(arguments: argparse.Namespace) -> dict[str, object]:
    """The backend's options among the arguments."""
    given: dict[str, object] = {"layer": arguments.layer, "selector": arguments.selector}
    if arguments.retain_tokens is not None:
        given["retain_tokens"] = arguments.retain_tokens
    return given


def load(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model that the arguments name, and its inputs.  Raises InputError."""
    # Fast failures first: weights may take minutes to load.
    image = hf.read_image(arguments.image)
    processor = hf.load_processor(arguments.model)
    inputs = hf.prompt_inputs(processor, image, arguments.prompt)
    model = hf.load_weights(arguments.model, arguments.device, arguments.dtype)
    return model, hf.to_model(inputs, model)
