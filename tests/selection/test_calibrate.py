"""Calibrated attention, against an eager model whose attention gets the same addend by hooks."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.errors import ConfigError, SelectionError, UnsupportedGraphError
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.hooks import Hooks, installed
from dartfx.tools.zoo.oracle import as_float64, cosine
from tests.support.families import fresh
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS: dict[str, Any] = {
    "retain_tokens": RETAIN,
    "calibrate": True,
    "lowering": "eager",
    "on_unsupported": "error",
}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def log_sizes(hooks: Hooks) -> Tensor:
    """The log of the number of tokens that each kept one stands for, counted one by one."""
    seen, keep_idx = hooks.selection_inputs, hooks.keep_idx
    assert seen is not None
    assert keep_idx is not None
    vectors, sizes = as_float64(seen.hidden), torch.ones(keep_idx.shape)
    for row, kept in enumerate(keep_idx.tolist()):
        slots = {k: n for n, k in enumerate(kept) if bool(seen.vision[row, k])}
        for token in seen.vision[row].nonzero()[:, 0].tolist():
            if token not in slots and slots:
                alike = {k: cosine(vectors[row, token], vectors[row, k]) for k in slots}
                sizes[row, slots[max(alike, key=lambda k: (alike[k], -k))]] += 1
    return sizes.log()


@contextmanager
def calibrated(hooks: Hooks) -> Iterator[None]:
    """Add them wherever attention reads kept keys: behind the cut, and in all later calls."""
    own, counted = torch.nn.functional.scaled_dot_product_attention, functools.cache(log_sizes)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        if hooks.keep_idx is None or key.shape[2] < hooks.keep_idx.shape[1]:
            return own(query, key, value, attn_mask=attn_mask, **more)
        sizes = counted(hooks).to(query)
        addend = torch.nn.functional.pad(sizes, (0, key.shape[2] - sizes.shape[1]))[:, None, None]
        if more.pop("is_causal", False):
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        attn_mask = addend if attn_mask is None else attn_mask + addend
        return own(query, key, value, attn_mask=attn_mask, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield


def reference(family: Any, inputs: dict[str, Any], tokens: int, **options: Any) -> Any:
    hooks = Hooks(family.model, inputs, 2, RETAIN, hooked.float64_selector)
    with calibrated(hooks), installed(hooks, "uniform"):
        return family.model.generate(**inputs, max_new_tokens=tokens, **GREEDY, **options)


@pytest.mark.parametrize(
    ("name", "variant"), [("llava", "ragged"), *slow(("qwen2_5_vl", "pad2"), ("gemma3", "one"))]
)
def test_generate(name: str, variant: str) -> None:
    family = fresh(name)
    inputs = family.make_inputs(variant)
    expected = reference(family, inputs, 4)
    plain = hooked.pruned_generate(family.model, inputs, retain=RETAIN, max_new_tokens=4)
    dartfx.compile(family.model, **OPTIONS)
    output = family.model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert torch.equal(output.sequences, expected.sequences)
    logits = torch.stack(output.logits, 1)
    torch.testing.assert_close(logits, torch.stack(expected.logits, 1), **CLOSE)
    assert not torch.allclose(logits[:, 0], plain.logits[:, 0], **CLOSE)
    assert any(isinstance(r.outcome, Pruned) for r in dartfx.reports())


def prefilled(family: Any, inputs: dict[str, Any]) -> Any:
    """The output of a compiled prefill, with the cache."""
    with torch.no_grad():
        return family.model(**inputs, use_cache=True)


def test_later_turns_and_copies_of_the_cache_are_calibrated() -> None:
    """Three tokens at once are as one by one; so are beams, a crop, and a cache saved to disk."""
    family = fresh("llava")
    inputs = family.make_inputs("ragged")
    rows, length = inputs["input_ids"].shape
    later = torch.randint(5, 20, (rows, 3), generator=torch.Generator().manual_seed(0))
    hooks = Hooks(family.model, inputs, 2, RETAIN, hooked.float64_selector)
    with calibrated(hooks), installed(hooks, "uniform"):
        cache, expected = family.model(**inputs, use_cache=True).past_key_values, []
        position = inputs["attention_mask"].sum(1, keepdim=True)
        for step in range(3):
            mask = inputs["attention_mask"]
            mask = torch.cat([mask, mask.new_ones(rows, step + 1)], 1)
            given = {"attention_mask": mask, "position_ids": position + step}
            logits = family.model(later[:, step : step + 1], past_key_values=cache, **given).logits
            expected.append(logits)
    model = dartfx.compile(family.model, **OPTIONS)
    cache = prefilled(family, inputs).past_key_values
    saved = io.BytesIO()
    torch.save(cache, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    beams = copy.deepcopy(cache)
    beams.batch_repeat_interleave(2)
    beams.reorder_cache(torch.tensor([0, 2, 1, 3]))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    positions = position + torch.arange(3)
    for held, picked in ((cache, [0, 1]), (loaded, [0, 1]), (beams, [0, 1, 0, 1])):
        given = {"attention_mask": mask[picked], "position_ids": positions[picked]}
        with torch.no_grad():
            made = model(later[picked], past_key_values=held, **given).logits
        torch.testing.assert_close(made, torch.cat(expected, 1)[picked], **CLOSE)
        held.crop(length)
        assert held.layers[0].kept.log_sizes.shape == held.layers[0].kept.keep_idx.shape


def test_a_cache_is_refused_where_nobody_makes_its_masks() -> None:
    family = fresh("llava")
    inputs = family.make_inputs("one")
    model = dartfx.compile(family.model, **OPTIONS)
    cache, token = prefilled(family, inputs).past_key_values, inputs["input_ids"][:, -1:]
    four = torch.zeros(1, 1, 1, cache.layers[0].keys.shape[2] + 1)
    with pytest.raises(SelectionError, match="not \\[rows, tokens\\] came with a calibrated"):
        model(token, past_key_values=copy.deepcopy(cache), attention_mask=four)
    with pytest.raises(SelectionError, match=r"only a model compiled by dartfx\.compile makes"):
        dartfx.uncompile(model)(token, past_key_values=cache)


def test_calibration_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match=r"calibrate=True counts .*\[2, 4\]"):
        dartfx.DartConfig(layer=(2, 4), retain_tokens=(9, 6), calibrate=True)
    with pytest.raises(ConfigError, match="leave kv_layout='layered' out"):
        dartfx.DartConfig(calibrate=True, kv_layout="layered")
    family = fresh("llava")
    inputs = family.make_inputs("one")
    bare = torch.compile(family.model, backend="dart", options=OPTIONS)
    with pytest.raises(Exception, match=r"a bare torch\.compile does not make"):
        bare(**inputs)
    model = dartfx.compile(family.model, **OPTIONS)
    with pytest.raises(
        UnsupportedGraphError, match="StaticCache is static, offloaded or quantised"
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    eager = fresh("llava", attention="eager")
    dartfx.compile(eager.model, **OPTIONS)
    with pytest.raises(UnsupportedGraphError, match="is not scaled_dot_product_attention"):
        eager.model(**inputs)
