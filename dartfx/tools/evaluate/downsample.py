"""The baseline without pruning: the unpruned model on a smaller image of as many tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt, log, sqrt
from typing import Any

from torch import Tensor

from dartfx.errors import InputError
from dartfx.integrations.hf import prompt_inputs
from dartfx.tools.evaluate.questions import Batch

__all__ = ["DOWNSAMPLED", "any_grid", "grid_of", "smaller_inputs", "vision_tokens_of"]

DOWNSAMPLED = "downsampled"  # in addition to the selectors' names

_BICUBIC = 3  # of Pillow
_INTERPOLATES = "interpolate_pos_encoding"


def grid_of(full: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Rows and columns of a grid of about ``tokens`` tokens, shaped like the grid ``full``."""
    scale = sqrt(tokens / (full[0] * full[1]))
    guess = [max(1, round(side * scale)) for side in full]
    near = [(guess[0] + a, guess[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]

    def off(grid: tuple[int, int]) -> float:
        """The combined deviation from the number of tokens and from the image's shape."""
        stretch = (grid[0] * full[1]) / (grid[1] * full[0])
        return abs(log(grid[0] * grid[1] / tokens)) + abs(log(stretch))

    return min((grid for grid in near if min(grid) > 0), key=lambda grid: (off(grid), grid))


def smaller_inputs(
    processor: Any, image: Any, prompt: str, *, tokens: int, of: int
) -> dict[str, Any]:
    """Inputs for the image resized from ``of`` to about ``tokens`` vision tokens.

    Raises InputError if the processor accepts no smaller image, or if the number of image tokens
    that it writes into the prompt differs from the image's number of patches.
    """
    pixels = prompt_inputs(processor, image, prompt).get("pixel_values")
    if pixels is None or pixels.ndim != 4 or pixels.shape[0] != 1:
        raise _impossible("the processor does not give one picture [1, channels, height, width]")
    height, width = pixels.shape[2:]
    side = isqrt(height * width // of)  # pixels of the square that is one vision token
    if side < 1 or side * side * of != height * width:
        raise _impossible(f"{of} vision tokens are no squares of {height} x {width} pixels")
    rows, columns = grid_of((height // side, width // side), tokens)
    resample = getattr(processor.image_processor, "resample", None) or _BICUBIC
    small = image.resize((columns * side, rows * side), resample)
    inputs = prompt_inputs(processor, small, prompt, do_resize=False)
    written = _written(processor, inputs["input_ids"])
    if written != rows * columns:
        raise _impossible(f"the prompt has {written} image tokens for {rows} x {columns} patches")
    return inputs


def vision_tokens_of(processor: Any, prompts: Sequence[Batch]) -> float:
    """The mean number of image tokens in the prompts of all questions."""
    rows = [(len(b.numbers), _written(processor, b.inputs["input_ids"][:1])) for b in prompts]
    return sum(number * written for number, written in rows) / sum(number for number, _ in rows)


def _written(processor: Any, ids: Tensor) -> int:
    return int((ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum())


def _impossible(because: str) -> InputError:
    return InputError("selectors", f"{DOWNSAMPLED!r} is not possible here: {because}; leave it out")


@contextmanager
def any_grid(model: Any) -> Iterator[None]:
    """Make towers with a position table interpolate it to the image's grid."""
    changed = []
    for module in model.modules():
        if _INTERPOLATES in inspect.signature(module.forward).parameters:
            module.forward = partial(module.forward, interpolate_pos_encoding=True)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
