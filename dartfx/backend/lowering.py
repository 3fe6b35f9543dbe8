"""Lowering: what compiles a graph after the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule

from dartfx import compat
from dartfx.backend.kernel_files import shared_files
from dartfx.backend.outlining import outlined
from dartfx.config.options import DartConfig
from dartfx.observe.compilation import Compilation
from dartfx.passes.frontend.normalise import SOURCE

__all__ = ["Lower", "as_from_dynamo", "lower", "lowering_with", "note_sources"]

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


def note_sources(module: GraphModule) -> None:
    """Note on the inputs of dynamo's graph where they come from, for graphs that are made of it."""
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta[SOURCE] = getattr(node, compat.INPUT_SOURCE, None)


def as_from_dynamo(module: GraphModule) -> None:
    """Let AOTAutograd take a rewritten graph for one of dynamo's, and so know its weights.

    Inductor's CUDA graphs copy all other inputs in every call, and hold a second one of each.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    constant = compat.find("ConstantSource")
    if hasattr(module, compat.PARAMETER_SOURCES) or constant is None:
        return
    if not any(node.meta.get(SOURCE) for node in inputs):  # of an exported program
        return
    seen = set()
    for node in inputs:
        source = node.meta.get(SOURCE)  # parts of one tensor subclass have the same
        setattr(node, compat.INPUT_SOURCE, None if source in seen else source)
        seen.add(source)
    module.meta.setdefault(compat.COMPILE_ID, None)
    parameters = module.named_parameters(remove_duplicate=False)
    held = [name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))]
    setattr(module, compat.PARAMETER_SOURCES, {name: constant(f"dartfx.{name}") for name in held})


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
    as_from_dynamo(module)
    compile_fx, patches = compat.compile_fx, config.inductor_patches()
    settings = torch.compiler.config
    tag = f"{settings.cache_key_tag}dartfx-{config.fingerprint()}"
    loaded = getattr(compat.find("PyCodeCache"), "modules", [])
    before = len(loaded)
    tagged = settings.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with compilation.measure(), tagged, shared_files():
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches)
    # Kernels are separate modules; the code that calls them has a function ``call``.
    note_output_code([str(m.__file__) for m in loaded[before:] if hasattr(m, "call")])
    return compiled  # type: ignore[no-any-return]
