"""Run by every Python process of the vLLM tests, whose PYTHONPATH holds this folder.

A torchvision that was built for CUDA cannot load its operators with a torch for the CPU, and then
fails to be imported: it describes two of them that are not there.  This defines those two.

vLLM's Model Runner V2 needs Triton, and its wheel for the CPU takes Triton's backend for the CPU,
which has no package.  With TRITON_INTERPRET=1 Triton's interpreter takes its part.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

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


class InterpretTriton:
    """Lets vLLM find a backend for the CPU, just before it looks; finds no module itself."""

    done = False

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == "vllm.triton_utils" and not cls.done:
            cls.done = True
            from triton.backends import backends
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
            for name, place in ("create_masked_load", 1), ("create_masked_store", 2):
                made = boolean_mask(getattr(InterpreterBuilder, name), place, TensorHandle)
                setattr(InterpreterBuilder, name, made)


def boolean_mask(method: Any, place: int, handle: Any) -> Any:
    """The interpreter insists on masks of booleans, and makes others of comparisons of scalars."""

    def masked(self: Any, *given: Any) -> Any:
        mask = handle(given[place].data.astype(bool), given[place].dtype)
        return method(self, *given[:place], mask, *given[place + 1 :])

    return masked


installed = [d.version for d in importlib.metadata.distributions(name="torchvision")]
if installed and "+cpu" not in installed[0]:
    sys.meta_path.insert(0, DefineOperators)  # type: ignore[arg-type]

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.meta_path.insert(0, InterpretTriton)  # type: ignore[arg-type]
