"""The ways to generate that are compared, each ready to be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

import dartfx
from dartfx.model.failures import not_one_graph
from dartfx.passes.outcome import Pruned
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.bench.timing import cache_bytes, twin

__all__ = ["USUAL", "VARIANTS", "Ready", "Settings", "greedy"]

HOOKS = "dartfx.tools.zoo.hooks"  # by name, since nothing but the zoo imports what names models
Generate = Callable[[int], Any]


@dataclass(frozen=True)
class Settings:
    """What is pruned, and what compiles: ``lowering`` is "inductor", "aot_eager" or "eager";
    dynamic: as in ``torch.compile``."""

    retain: int
    layer: int = 2
    lowering: str = "inductor"
    dynamic: bool | None = None


@dataclass(frozen=True)
class Ready:
    """One way to generate, compiled as far as it can be before it runs.

    generate: (new tokens) -> what ``generate`` of ``model`` returns for ``inputs``; kv_bytes: of
    the caches after a prefill; check: raises where nothing was pruned, else what was; note: how it
    was compiled.
    """

    model: Any
    inputs: dict[str, Any]
    generate: Generate
    kv_bytes: Callable[[], int]
    check: Callable[[], Pruned | None] = lambda: None
    note: str = ""


def greedy(model: Any, inputs: dict[str, Any], new_tokens: int, **more: Any) -> Any:
    """Greedy ``generate`` of this many tokens unless it ends early, with its caches."""
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **more,
    )


def _ready(model: Any, work: Workload, generate: Generate, **more: Any) -> Ready:
    measured = lambda: cache_bytes(generate(1).past_key_values)  # noqa: E731
    return Ready(model, work.inputs, generate, measured, **more)


def eager(work: Workload, settings: Settings) -> Ready:
    """The model as it is."""
    return _ready(work.model, work, partial(greedy, work.model, work.inputs))


def hooked(work: Workload, settings: Settings) -> Ready:
    """The eager model pruned by forward hooks, with dartfx's own operator for the selection.

    The published selection is a loop that waits for the device at every pivot.
    """
    hooks: Any = import_module(HOOKS)
    counts = work.vision_tokens, settings.retain

    def select(given: Any, _: int) -> Tensor:
        kept: Tensor = torch.ops.dartfx.select_tokens(
            given.hidden, given.keys, given.vision, None, *counts, 4, 4, "dart", "auto"
        )
        return kept

    def generate(new_tokens: int) -> Any:
        where = settings.layer, settings.retain, select
        one_call = hooks.Hooks(work.model, work.inputs, *where, vision=work.vision)
        with hooks.installed(one_call, "layered"):
            return greedy(work.model, work.inputs, new_tokens)

    return _ready(work.model, work, generate)


def _plain(work: Workload, settings: Settings, **more: Any) -> Ready:
    model = twin(work.model)
    generate: Generate = partial(greedy, model, work.inputs, **more)
    # transformers sets up parts of a model in its first call, under a lock that breaks the graph.
    generate(1)
    _compile(model, settings, fullgraph=True)
    try:
        generate(1)
    except not_one_graph():
        _compile(model, settings, fullgraph=False)
        return _ready(model, work, generate, note="several graphs")
    return _ready(model, work, generate, note="one graph")


def _compile(model: Any, settings: Settings, *, fullgraph: bool) -> None:
    """``model.compile()``, but for calls inside of another compilation.

    There, transformers compiles the decode steps of a static cache: in CUDA graphs, which they
    would not get if what is compiled here ran inside.
    """
    compiled = torch.compile(
        model._call_impl,
        backend=settings.lowering,
        dynamic=settings.dynamic,
        fullgraph=fullgraph,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = model._call_impl if torch.compiler.is_compiling() else compiled
        return chosen(*args, **kwargs)

    model._compiled_call_impl = call


def plain(work: Workload, settings: Settings) -> Ready:
    """``model.compile()``, as one graph where dynamo can: the stronger baseline."""
    return _plain(work, settings)


def plain_static(work: Workload, settings: Settings) -> Ready:
    """The same with a static cache; see :func:`dart_static`."""
    return _plain(work, settings, **_static(work, settings))


def _dart(
    work: Workload, settings: Settings, options: Mapping[str, Any] | None = None, **more: Any
) -> Ready:
    model = dartfx.compile(
        twin(work.model),
        retain_tokens=settings.retain,
        layer=settings.layer,
        lowering=settings.lowering,
        dynamic=settings.dynamic,
        on_unsupported="error",  # a row without pruning would be a wrong number
        **(options or {}),
    )

    def check() -> Pruned:
        made = dartfx.reports(model)
        for report in made:
            if isinstance(report.outcome, Pruned):
                return report.outcome
        raise RuntimeError("nothing was pruned: " + "; ".join(map(str, made)))

    return _ready(model, work, partial(greedy, model, work.inputs, **more), check=check)


def dart(work: Workload, settings: Settings) -> Ready:
    """``dartfx.compile(model)``."""
    return _dart(work, settings)


def dart_flat(work: Workload, settings: Settings) -> Ready:
    """The same with every layer compiled on its own."""
    return _dart(work, settings, {"outline_layers": False})


def dart_layered(work: Workload, settings: Settings) -> Ready:
    """The same with whole caches in the layers before the cut."""
    return _dart(work, settings, {"kv_layout": "layered"})


def dart_graphs(work: Workload, settings: Settings) -> Ready:
    """The same with prefills in CUDA graphs."""
    return _dart(work, settings, {"prefill": "graphs"})


def dart_bucketed(work: Workload, settings: Settings) -> Ready:
    """The same of padded prompts."""
    return _dart(work, settings, {"prefill": "bucketed"})


def dart_eager_tower(work: Workload, settings: Settings) -> Ready:
    """With a vision tower that dynamo leaves out, where generate does not run it before."""
    model = twin(work.model)
    base: Any = model.base_model
    base.get_image_features = torch.compiler.disable(base.get_image_features)  # type: ignore[no-untyped-call]
    return _dart(replace(work, model=model), settings)


def dart_reduced(work: Workload, settings: Settings) -> Ready:
    """With Inductor's CUDA graphs; of one token, since decode would record every length."""
    return _dart(work, settings, {"mode": "reduce-overhead"})


def dart_static(work: Workload, settings: Settings) -> Ready:
    """The same with a static cache, which transformers compiles decode for: on CUDA as graphs."""
    return _dart(work, settings, **_static(work, settings))


def _static(work: Workload, settings: Settings) -> dict[str, Any]:
    """Arguments of ``generate``."""
    graphs = settings.lowering == "inductor" and work.model.device.type == "cuda"
    config = CompileConfig(backend=settings.lowering, mode="reduce-overhead" if graphs else None)
    config._compile_all_devices = True  # else transformers compiles decode only on accelerators
    return {"cache_implementation": "static", "compile_config": config}


VARIANTS: dict[str, tuple[str, Callable[[Workload, Settings], Ready]]] = {
    "eager": ("eager", eager),
    "hooks": ("eager + hooks", hooked),
    "plain": ("plain Inductor", plain),
    "dart": ("dart", dart),
    "plain_static": ("plain Inductor + static cache + compiled decode", plain_static),
    "dart_static": ("dart + static cache + compiled decode", dart_static),
    "dart_flat": ("dart, outline_layers=False", dart_flat),
    "dart_layered": ('dart, kv_layout="layered"', dart_layered),
    "dart_graphs": ("dart, prefill in CUDA graphs", dart_graphs),
    "dart_bucketed": ("dart, padded prefill in CUDA graphs", dart_bucketed),
    "dart_eager_tower": ("dart, vision tower left eager", dart_eager_tower),
    "dart_reduced": ('dart, mode="reduce-overhead"', dart_reduced),
}

# Rows that are measured where none are named.
USUAL = tuple(VARIANTS)[:6]
