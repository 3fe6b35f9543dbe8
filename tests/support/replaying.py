"""A recorder for a CPU, where there are no CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Again:
    """Stands for CUDA graphs: replaying computes into the same outputs again."""

    def here(self) -> torch.device:
        return torch.device("cpu")

    def queue(self) -> object:
        return "the only one"

    def record(self, run: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        outputs = run(*args)

        def replay() -> None:
            for old, new in zip(outputs, run(*args), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)

        return replay, outputs
