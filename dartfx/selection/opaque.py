"""Functions that stay one call in what Inductor compiles for a CPU.

Inlined, running counts, searches and sorts over a few hundred positions split a graph into some
twenty C++ files, each of which takes seconds to compile, for loops that run no faster for it.  What
reads keys or hidden states is worth compiling and stays outside.  On other devices all is inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.library import custom_op

__all__ = ["BODIES", "opaque_on_cpu"]

Args = ParamSpec("Args")
Result = TypeVar("Result")

BODIES: dict[object, Callable[..., Any]] = {}
"""What each of these operators does, by overload."""

DEVICES = {"cpu"}

_registered: list[object] = []  # torch holds them by weak references only


def opaque_on_cpu(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Make a function an operator of dartfx that a compiler does not look into on a CPU.

    schema: the operator's, without its name, which is the function's.  fake: empty results for
    fake arguments.  The function's first argument is a tensor; results must not be views.
    """

    def register(function: Callable[Args, Result]) -> Callable[Args, Result]:
        name = function.__name__
        defined = custom_op(f"dartfx::{name}", function, mutates_args=(), schema=schema)
        defined.register_fake(fake)
        _registered.append(defined)
        operator = getattr(torch.ops.dartfx, name)
        BODIES[operator.default] = function

        @wraps(function)
        def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            tensor: Any = args[0]
            chosen = operator if tensor.device.type in DEVICES else function
            result: Result = chosen(*args, **kwargs)
            return result

        return call

    return register
