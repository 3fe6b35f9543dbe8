"""Whether equal layers of a graph are compiled once, as calls of one subgraph."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule

from dartfx import compat
from dartfx.config.options import DartConfig
from dartfx.observe.compilation import Compilation
from dartfx.passes.internal_error import internal_error
from dartfx.passes.layers.equal_runs import value_of
from dartfx.passes.transform.outline_layers import outline_layers

__all__ = ["outlined"]

# Neither of the first two knows subgraphs; CUDA graphs are split around what cannot be recorded,
# for which Inductor does not look into them.
_FLAT_UNDER = ("cpp_wrapper", "freezing", "triton.cudagraphs")


def outlined(
    config: DartConfig, module: GraphModule, inputs: Sequence[Any], compilation: Compilation
) -> GraphModule:
    """The graph as Inductor gets it: with calls of equal layers where that can be, else as it is.

    What was done, or why not, is noted in ``compilation``.
    """
    if because := _why_not(config, module, inputs):
        compilation.flat = because
        return module
    try:
        result = outline_layers(module)
    except Exception as error:
        # The flat graph computes the same; only the wait is longer.
        compilation.flat = str(internal_error("outline layers", error))
        return module
    if result is None:
        compilation.flat = "no two layers in a row are equal"
        return module
    compilation.outlined = result.layers
    return result.module


def _why_not(config: DartConfig, module: GraphModule, inputs: Sequence[Any]) -> str:
    """Why no layer may become a call of a subgraph; "" when they may."""
    if not config.outline_layers:
        return "outline_layers is off"
    if not hasattr(torch.ops.higher_order, "invoke_subgraph"):
        return "this version of torch calls no subgraphs"
    if torch.is_grad_enabled() and any(getattr(i, "requires_grad", False) for i in inputs):
        return "the call records gradients"
    if any(n.target is compat.enter_autocast for n in module.graph.nodes):
        return "autocast begins inside the graph"
    if any(n.op == "placeholder" and _is_symbolic(value_of(n)) for n in module.graph.nodes):
        # Inductor writes no code for S', which several symbols make up, inside of a subgraph.
        return "sizes are symbolic"
    settings = config.inductor_patches()
    for option in _FLAT_UNDER:
        if settings.get(option, attrgetter(option)(compat.inductor_config)):
            return f"Inductor's option {option} is on"
    return ""


def _is_symbolic(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt)
