"""A model and its prompt from the command line: what explain and show share."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import torch

from dartfx.errors import DartfxError

__all__ = ["CommandError", "add_arguments", "load", "options"]

DTYPES = ("float32", "bfloat16", "float16")


class CommandError(DartfxError):
    """What stops a command, told without a traceback."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which model, image, question and options."""
    add = parser.add_argument
    add(
        "--model", required=True, help="a vision-language model on the Hugging Face hub or a folder"
    )
    add("--image", required=True, help="an image file")
    add("--prompt", default="What is shown in this image?", help="the question (%(default)s)")
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
    """The model, and the inputs that its processor makes of image and prompt.

    Raises CommandError when a package, the image or the model is missing.
    """
    if "TORCH_LOGS" not in os.environ:
        # A graph break is part of what is explained; torch prints a page of its own about it.
        logging.getLogger("torch._dynamo.variables.tensor").setLevel(logging.ERROR)
    try:
        from PIL import Image, UnidentifiedImageError
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise CommandError(f"{error.name} is missing: pip install 'dartfx[demo]'") from error
    try:
        image = Image.open(arguments.image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CommandError(f"cannot read the image {arguments.image!r}: {error}") from error
    dtype = getattr(torch, arguments.dtype or _dtype(arguments.device))
    try:
        processor = AutoProcessor.from_pretrained(arguments.model)
        model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"cannot load the model {arguments.model!r}: {error}") from error
    model = model.to(arguments.device).eval()
    content = [{"type": "image"}, {"type": "text", "text": arguments.prompt}]
    if getattr(processor, "chat_template", None):
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
    else:
        text = f"{processor.image_token}\n{arguments.prompt}"
    made = processor(images=image, text=text, return_tensors="pt").to(arguments.device)
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


def _dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"
