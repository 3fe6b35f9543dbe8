"""Compiled code belongs to one model: copies, replicas, changes, and uncompiling."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

GREEDY = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}


@functools.cache
def llava() -> Family:
    return load("llava", layers=3)


def compiled(**options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    return dartfx.compile(copy.deepcopy(llava().model), **settings)


def cache_of(output: Any) -> str:
    return type(output.past_key_values).__name__


def test_decode_static_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    model, inputs = compiled(decode="static"), llava().make_inputs()
    once = GREEDY | {"max_new_tokens": 1}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("cache_implementation") is None
    assert cache_of(model.generate(**inputs, **once)) == "StaticCache"
    assert cache_of(model.generate(**inputs, **once, cache_implementation="dynamic")) != (
        "StaticCache"
    )
    torch.compiler.reset()
    dartfx.compile(model, retain_tokens=RETAIN, lowering="eager")
    assert cache_of(model.generate(**inputs, **once)) == "DynamicCache"


def test_uncompile_is_the_way_back() -> None:
    inputs, plain = llava().make_inputs(), llava().model
    model = compiled(decode="static")
    assert dartfx.uncompile(model) is model
    assert model._compiled_call_impl is None
    assert {"generate", "_replicate_for_data_parallel"}.isdisjoint(vars(model))
    assert inspect.ismethod(model.generate)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    assert dartfx.uncompile(dartfx.uncompile(model)) is model
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got builtin"):
        dartfx.uncompile(len)  # type: ignore[type-var]


def test_uncompile_gives_a_class_its_own_generate_back() -> None:
    model = load("janus", layers=3).model
    dartfx.compile(model, retain_tokens=RETAIN, lowering="eager")
    assert model.generate.__self__ is model
    assert "generate" in vars(model)
    dartfx.uncompile(model)
    assert "generate" not in vars(model)


def test_a_replica_of_data_parallel_is_refused_and_runs_its_own_weights() -> None:
    inputs = llava().make_inputs()
    model = compiled(on_unsupported="warn")
    replica = model._replicate_for_data_parallel()
    replica.lm_head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        replica.lm_head.weight.zero_()
        with pytest.warns(dartfx.PruningWarning, match="DataParallel"):
            logits = replica(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    assert logits.eq(0).all()
    assert "generate" not in vars(replica)


def test_a_copy_replicates_itself() -> None:
    twin = copy.deepcopy(compiled())
    assert twin._replicate_for_data_parallel().model is twin.model
    assert twin._compiled_call_impl is None


def resize(model: Any) -> None:
    model.resize_token_embeddings(230, mean_resizing=False)


def attend_eagerly(model: Any) -> None:
    model.set_attn_implementation("eager")


def to_double(model: Any) -> None:
    model.to(torch.float64)


def merge_an_adapter(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.weight.mul_(1.5)


class Adapter(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def insert_an_adapter(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)


CHANGES = [resize, merge_an_adapter, insert_an_adapter, *slow(attend_eagerly, to_double)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_model_that_changes_after_it_ran(change: Any) -> None:
    inputs = llava().make_inputs("pad2")
    steps = 2 if change is insert_an_adapter else 1  # one of them also decodes
    how = {**GREEDY, "max_new_tokens": steps, "output_logits": True}
    model = compiled(kv_layout="uniform")
    model.generate(**inputs, **how)
    change(model)
    plain = copy.deepcopy(model)
    oracle = hooked.pruned_generate(
        plain, inputs, retain=RETAIN, max_new_tokens=steps, kv_layout="uniform"
    )
    ours = model.generate(**inputs, **how)
    torch.testing.assert_close(torch.stack(ours.logits, 1), oracle.logits, **CLOSE)
