"""Loads Hugging Face models and prepares their inputs from an image and a prompt.

Errors are :class:`~dartfx.errors.InputError`, which names what cannot be used and what to do.
Loading runs code of transformers, the tokeniser and Pillow, which may raise anything for a file
that is missing, truncated or of the wrong kind; any such exception becomes an InputError with the
original as its cause.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dartfx.errors import InputError
from dartfx.integrations.prompts import prompt_text

__all__ = [
    "load_model",
    "load_processor",
    "load_weights",
    "prompt_inputs",
    "quiet_dynamo",
    "read_image",
    "to_model",
]


def load_model(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **arguments: Any,
) -> tuple[Any, Any]:
    """Load a vision-language model for inference, and its processor.

    name: a folder or a name on the hub.  device: defaults to the GPU if there is one.  dtype: of
    the weights; defaults to float32 on a CPU, bfloat16 elsewhere.  arguments: passed to
    ``from_pretrained`` (attn_implementation, revision, trust_remote_code).  Raises InputError when
    transformers is missing, or the device, the model or its processor cannot be used.
    """
    # Processor first: it loads fast, and the model is useless without one.
    processor = load_processor(
        name, **{k: v for k, v in arguments.items() if k in ("revision", "trust_remote_code")}
    )
    return load_weights(name, device, dtype, **arguments), processor


def load_processor(name: str, **arguments: Any) -> Any:
    """Load only the processor, as in :func:`load_model`."""
    _check_folder(name)
    try:
        processor = _transformers().AutoProcessor.from_pretrained(name, **arguments)
    except Exception as error:
        why = f"cannot load the processor of {name!r}: {_line(error)}"
        raise InputError("model", why) from error
    if getattr(processor, "image_processor", None) is None:
        raise InputError(
            "model",
            f"{name!r} has no processor for images (preprocessor_config.json): save the processor "
            "into the folder, or take a vision-language model",
        )
    return processor


def load_weights(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **arguments: Any,
) -> Any:
    """Load only the model, as in :func:`load_model`."""
    _check_folder(name)
    device = _device(device)
    weights = _dtype(dtype, device)
    factory = _transformers().AutoModelForImageTextToText
    try:
        model = factory.from_pretrained(name, dtype=weights, **arguments)
    except Exception as error:
        raise InputError("model", f"cannot load the model {name!r}: {_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("model", f"{error.name} is missing: pip install 'dartfx[hf]'") from error
    return transformers


def _check_folder(name: str) -> None:
    path = Path(name)
    if name.startswith((".", "/", "~")) and not path.exists():  # never a hub name
        raise InputError("model", f"there is no folder {name!r}")
    if path.exists() and not (path / "config.json").is_file():
        raise InputError("model", f"{name!r} is not a model folder: it has no config.json")


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).split("\n")[0]
        raise InputError("device", f"{str(name)!r} cannot be used here: {why}") from error


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise InputError("dtype", f"{dtype!r} is not a torch dtype, such as bfloat16")
    return found


def read_image(path: str | Path) -> Any:
    """Read the whole image at ``path`` as RGB, so that a truncated file fails here.

    Raises InputError when Pillow or the file is missing, or the file is not an image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError("image", "Pillow is missing: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError("image", f"{str(path)!r} is not a picture that Pillow can read") from error
    except FileNotFoundError as error:
        raise InputError("image", f"there is no file {str(path)!r}") from error
    except Exception as error:
        raise InputError("image", f"cannot read {str(path)!r}: {_line(error)}") from error


def prompt_inputs(processor: Any, image: Any, prompt: str, **settings: Any) -> dict[str, Any]:
    """Prepare model inputs on the CPU for one image and a prompt.

    The image and the prompt become a user turn of the processor's chat template; a prompt that
    already contains the image token is used verbatim.  settings: of the processor, such as
    do_resize.  Raises InputError when the prompt cannot be tokenised.
    """
    token = getattr(processor, "image_token", None)
    if token is not None and token in prompt:
        text = prompt
    elif token is not None or getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = prompt_text(processor, [{"role": "user", "content": content}])
    else:
        raise InputError(
            "model",
            "its processor has neither a chat template nor an image token to write a prompt",
        )
    try:
        return dict(processor(images=image, text=text, return_tensors="pt", **settings))
    except Exception as error:
        raise InputError(
            "prompt",
            f"the processor cannot make inputs of {prompt!r}: {_line(error)}; write it in words of "
            "the tokeniser's vocabulary, with at most one image token",
        ) from error


def to_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Move the inputs to the model's device, and floating-point ones to its dtype."""
    weight = next(model.parameters())
    moved = {name: value.to(weight.device) for name, value in inputs.items()}
    return {k: v.to(weight.dtype) if v.is_floating_point() else v for k, v in moved.items()}


def quiet_dynamo() -> None:
    """Silence dynamo's long message on a graph break where the caller explains the break."""
    if "TORCH_LOGS" not in os.environ:
        logging.getLogger("torch._dynamo.variables.tensor").setLevel(logging.ERROR)


def _line(error: BaseException) -> str:
    """The error's text on one line, with its type where the text alone says nothing."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 300 else f"{text[:297]}..."
    return (
        short
        if isinstance(error, OSError | ValueError) and short
        else (f"{type(error).__name__}: {short}")
    )
