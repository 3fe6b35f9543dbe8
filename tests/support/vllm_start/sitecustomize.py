"""Run by every Python process of the vLLM tests, whose PYTHONPATH holds this folder.

A torchvision that was built for CUDA cannot load its operators beside a torch for the CPU, and then
fails to be imported: it describes two of them that are not there.  This defines those two.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from types import ModuleType

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DefineOperators:
    """Defines them just before torchvision is imported; finds no module itself."""

    library: object = None

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision" and cls.library is None:
            from torch.library import Library

            cls.library = library = Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator)


installed = [d.version for d in importlib.metadata.distributions(name="torchvision")]
if installed and "+cpu" not in installed[0]:
    sys.meta_path.insert(0, DefineOperators)  # type: ignore[arg-type]
