"""What ``bench generate`` runs: a model and its prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """A model in eval mode on its device, and prompts of one length as ``generate`` takes them.

    inputs: keyword arguments of ``generate``, input_ids [B, S] among them.  vision: [B, S] bool,
    as many in every row.
    """

    name: str
    model: Any
    inputs: dict[str, Any]
    vision: Tensor

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of each prompt."""
        return int(self.vision[0].sum())

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return int(self.vision.shape[0])
