"""Helpers for tests of ``generate``: compiled copies of tiny families, and the hooks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import dartfx
from dartfx.model.caches.kv_cache import pruned_length
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import RETAIN

NAMES = ["llava", "qwen2_5_vl"]
FAMILIES = [NAMES[0], *slow(*NAMES[1:])]


@functools.cache
def family(name: str) -> Family:
    return load(name, layers=3)


def fast(built: Family, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    return dartfx.compile(copy.deepcopy(built.model), **settings)


@functools.cache
def shared(name: str) -> Any:
    """One compiled model for all questions of a file that is marked ``shares_compiled``."""
    return fast(family(name))


def pruned() -> int:
    return sum(isinstance(r.outcome, Pruned) for r in dartfx.reports())


def dropped(made: Any) -> int:
    """How many tokens of the prompt the caches that ``generate`` returns do without."""
    return int(pruned_length(made.past_key_values))


def by_hooks(
    built: Family, inputs: Inputs, layout: hooked.KvLayout, copies: int = 1, **how: Any
) -> Any:
    """``generate`` of the eager model pruned by hooks; copies: rows that it makes of each row."""
    rows = {
        name: value.repeat_interleave(copies, 0) if value.shape[0] == batch_of(inputs) else value
        for name, value in inputs.items()
    }
    hooks = hooks_of.Hooks(built.model, rows, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, layout):
        return built.model.generate(**inputs, **settings_of(how))


def batch_of(inputs: Inputs) -> int:
    return int(inputs["input_ids"].shape[0])


def settings_of(how: dict[str, Any]) -> dict[str, Any]:
    return {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True} | how


def without_mask(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}
