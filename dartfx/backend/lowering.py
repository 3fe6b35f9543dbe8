"""Lowering: what compiles a graph after the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule

from dartfx import compat
from dartfx.backend.outlining import outlined
from dartfx.config.options import DartConfig
from dartfx.observe.compilation import Compilation

__all__ = ["Lower", "lower", "lowering_with"]

Lower = Callable[[DartConfig, GraphModule, Sequence[Any]], Callable[..., Any]]

_replacement: ContextVar[Lower | None] = ContextVar("dartfx_lower", default=None)


@contextmanager
def lowering_with(replacement: Lower) -> Iterator[None]:
    """Lower the graphs compiled inside the ``with`` block by ``replacement``; it may call lower.

    For tools that run rewritten graphs in another way.
    """
    token = _replacement.set(replacement)
    try:
        yield
    finally:
        _replacement.reset(token)


def lower(
    config: DartConfig,
    module: GraphModule,
    inputs: Sequence[Any],
    note_output_code: Callable[[Sequence[str]], None] = lambda files: None,
    compilation: Compilation | None = None,
) -> Callable[..., Any]:
    """Compile ``module`` as ``config.lowering`` says, or as :func:`lowering_with` does.

    note_output_code: receives the files of Inductor's code; compilation: is filled in.
    The config's fingerprint goes into the compilers' cache keys: those hash the graph but not the
    Python that an operator decomposes through, so an edited operator would hit an old entry.
    """
    if (replacement := _replacement.get()) is not None:
        token = _replacement.set(None)  # it may call this function
        try:
            return replacement(config, module, inputs)
        finally:
            _replacement.reset(token)
    if config.lowering == "eager":
        return module.forward
    if config.lowering == "aot_eager":
        eager: Callable[..., Any] = compat.aot_eager(module, list(inputs))
        return eager
    compilation = Compilation() if compilation is None else compilation
    module = outlined(config, module, inputs, compilation)
    compile_fx, patches = compat.compile_fx, config.inductor_patches()
    settings = torch.compiler.config
    tag = f"{settings.cache_key_tag}dartfx-{config.fingerprint()}"
    loaded = getattr(compat.find("PyCodeCache"), "modules", [])
    before = len(loaded)
    with compilation.measure(), settings.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches)
    # Kernels are modules of their own; the code that calls them has a function ``call``.
    note_output_code([str(m.__file__) for m in loaded[before:] if hasattr(m, "call")])
    return compiled  # type: ignore[no-any-return]
