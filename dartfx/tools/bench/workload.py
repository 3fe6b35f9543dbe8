"""What ``bench generate`` runs: a model and one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """A model in eval mode on its device, and one prompt as ``generate`` takes it.

    inputs: keyword arguments of ``generate``, input_ids [1, S] among them.  vision: [1, S] bool.
    """

    name: str
    model: Any
    inputs: dict[str, Any]
    vision: Tensor

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the prompt."""
        return int(self.vision.sum())
