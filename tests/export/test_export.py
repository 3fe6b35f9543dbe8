"""``dartfx.prune_exported`` against the eager model pruned by hooks with the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.integrations.executorch import register_dynamic_cache_export_support
from transformers.modeling_outputs import BaseModelOutputWithPooling

import dartfx
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.exporting import (
    LENGTH,
    Inputs,
    Prefill,
    assert_same,
    export,
    oracle,
    prefill,
)
from tests.support.tolerances import CLOSE, RETAIN

# How a program was exported matters to its calls, of which test_equal_to_hooks has all kinds.
STRICT = [
    pytest.param(False, id="non_strict"),
    pytest.param(True, id="strict", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("name", "variant", "strict"),
    [
        ("llava", "one", False),
        pytest.param("llava", "one", True, marks=pytest.mark.slow),
        pytest.param("llava", "pad2", False, marks=pytest.mark.slow),
        ("llava", "pad2", True),
        ("internvl", "pad2", False),
        pytest.param("gemma3", "one", True, marks=pytest.mark.slow),
    ],
)
def test_equal_to_hooks(name: str, variant: str, strict: bool) -> None:
    family = load(name, layers=3)
    inputs = family.make_inputs(variant)
    if name == "gemma3":
        del inputs["token_type_ids"]
    given = prefill(family, inputs, strict)
    pruned = dartfx.prune_exported(given, retain_tokens=RETAIN)
    assert_same(pruned.module()(**inputs), oracle(family, inputs))


def test_merging_is_plain_aten_too(llava: Family, program: ExportedProgram) -> None:
    inputs = llava.make_inputs()
    pruned = dartfx.prune_exported(program, retain_tokens=RETAIN, merge="nearest")
    assert_same(pruned.module()(**inputs), oracle(llava, inputs, merge=True))
    assert not [n for n in pruned.graph.nodes if str(n.target).startswith("dartfx")]


def test_layered_caches_and_no_caches(llava: Family) -> None:
    inputs = llava.make_inputs()
    wanted = oracle(llava, inputs, kv_layout="layered")
    layered = dartfx.prune_exported(
        prefill(llava, inputs), retain_tokens=RETAIN, kv_layout="layered"
    )
    assert_same(layered.module()(**inputs), wanted)
    given = prefill(llava, inputs, caches=False)
    alone = dartfx.prune_exported(given, retain_tokens=RETAIN)
    torch.testing.assert_close(alone.module()(**inputs), wanted.logits, **CLOSE)
    pruning = dartfx.exported_pruning(alone)
    assert pruning is not None
    assert pruning.kv_layout == "none returned"


class LanguageHalf(nn.Module):
    """A model whose image features are computed outside of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, features: Tensor
    ) -> Any:
        image = BaseModelOutputWithPooling(pooler_output=(features,))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs={"image": image},
            use_cache=True,
        )
        return output.logits, [(e.keys, e.values) for e in output.past_key_values.layers]


def language_inputs(family: Family, inputs: Inputs) -> Inputs:
    core, grid = family.model.model, inputs["image_grid_thw"]
    found = core.get_image_features(inputs["pixel_values"], grid, return_dict=True)
    positions = core.compute_3d_position_ids(
        input_ids=inputs["input_ids"],
        image_grid_thw=grid,
        video_grid_thw=None,
        inputs_embeds=core.get_input_embeddings()(inputs["input_ids"]),
        attention_mask=inputs["attention_mask"],
        past_key_values=None,
        mm_token_type_ids=inputs.get("mm_token_type_ids"),
    )
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    return text | {"position_ids": positions, "features": torch.cat(found.pooler_output)}


@pytest.fixture(scope="module")
def qwen() -> Family:
    family = load("qwen2_5_vl", layers=3)
    family.model(**family.make_inputs())
    return family


@pytest.mark.parametrize("strict", STRICT)
def test_language_half_of_a_model_with_dynamic_images(qwen: Family, strict: bool) -> None:
    inputs = qwen.make_inputs("pad2")
    given = language_inputs(qwen, inputs)
    pruned = dartfx.prune_exported(
        export(LanguageHalf(qwen.model), given, strict), retain_tokens=RETAIN
    )
    assert_same(pruned.module()(**given), oracle(qwen, inputs))


def test_dynamic_batch_and_length(qwen: Family) -> None:
    batch, length = Dim("batch", min=2, max=8), Dim("length", min=20, max=300)
    sizes = {
        "input_ids": {0: batch, 1: length},
        "attention_mask": {0: batch, 1: length},
        "position_ids": {1: batch, 2: length},
        "features": {0: 16 * batch},
    }
    given = language_inputs(qwen, qwen.make_inputs("pad2"))
    exported = export(LanguageHalf(qwen.model), given, strict=False, dynamic=sizes)
    pruned = dartfx.prune_exported(exported, retain_tokens=RETAIN)
    for variant, tokens in (("pad2", 31), ("pad4", 27), ("pad2", 60)):
        inputs = qwen.make_inputs(variant, length=tokens)
        output = pruned.module()(**language_inputs(qwen, inputs))
        assert_same(output, oracle(qwen, inputs))


@pytest.mark.parametrize("strict", STRICT)
def test_dynamic_length_keeps_its_constraints(llava: Family, strict: bool) -> None:
    exported = export(Prefill(llava.model), llava.make_inputs("pad2"), strict, LENGTH)
    pruned = dartfx.prune_exported(exported, retain_tokens=RETAIN)
    for symbol, bounds in exported.range_constraints.items():
        assert pruned.range_constraints[symbol] == bounds
    for tokens in (25, 29, 60):
        inputs = llava.make_inputs("pad2", length=tokens)
        assert_same(pruned.module()(**inputs), oracle(llava, inputs))
    (logits,) = (o for o in dartfx.exported_pruning(pruned).outputs if o.name == "[0]")
    symbol = logits.before[1]
    assert logits.after == ("2", f"{symbol} - 10", "200")


def test_refused_where_dynamic_sizes_decide(qwen: Family) -> None:
    given = language_inputs(qwen, qwen.make_inputs())
    features = {**dict.fromkeys(given), "features": {0: Dim.AUTO}}
    exported = export(LanguageHalf(qwen.model), given, strict=False, dynamic=features)
    with pytest.raises(dartfx.UnsupportedGraphError, match=r"dynamic sizes.*only where .* > 6"):
        dartfx.prune_exported(exported, retain_tokens=RETAIN)


@pytest.mark.parametrize("strict", STRICT)
def test_dynamic_cache_as_a_pytree_and_keep_idx(llava: Family, strict: bool) -> None:
    register_dynamic_cache_export_support()
    inputs = llava.make_inputs("pad2")
    exported = export(llava.model, inputs, strict)
    pruned = dartfx.prune_exported(exported, retain_tokens=RETAIN, tokens=True)
    output, keep = pruned.module()(**inputs)
    wanted = oracle(llava, inputs)
    assert torch.equal(keep, wanted.keep_idx)
    layers = [(e.keys, e.values) for e in output.past_key_values.layers]
    assert_same((output.logits, layers), wanted)
    pruning = dartfx.exported_pruning(pruned)
    assert pruning is not None
    assert pruning.kept == 8  # logits, 3 layers of keys and values, image features


@pytest.mark.slow
def test_several_stages(llava: Family, program: ExportedProgram) -> None:
    """Two cuts of an exported program keep what the same two keep under torch.compile."""
    inputs = llava.make_inputs()
    options = {"layer": [1, 2], "retain_tokens": [10, 4], "kv_layout": "layered"}
    pruned = dartfx.prune_exported(program, **options, tokens=True)
    pruning = dartfx.exported_pruning(pruned)
    assert pruning is not None
    assert (pruning.layers, pruning.sequence) == ((1, 2), (29, 17))
    compiled = torch.compile(llava.model, backend="dart", options=options | {"lowering": "eager"})
    with torch.no_grad():
        wanted = compiled(**inputs)
    (logits, layers), keep = pruned.module()(**inputs)
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    assert [k.shape[2] for k, _ in layers] == [29, 23, 17]
    ids = inputs["input_ids"].gather(1, keep)
    assert keep.shape == (1, 17)
    assert int((ids == llava.image_token_id).sum()) == 4
