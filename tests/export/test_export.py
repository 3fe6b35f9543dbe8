"""``dartfx.prune_exported`` against the eager model pruned by hooks with the float64 oracle."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.integrations.executorch import register_dynamic_cache_export_support
from transformers.modeling_outputs import BaseModelOutputWithPooling

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.exporting import Inputs, Prefill, export, prefill
from tests.support.tolerances import CLOSE, RETAIN

# How a program was exported matters to its calls, of which test_equal_to_hooks has all kinds.
STRICT = [
    pytest.param(False, id="non_strict"),
    pytest.param(True, id="strict", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def llava() -> Family:
    return load("llava", layers=3)


@pytest.fixture(scope="module")
def program(llava: Family) -> ExportedProgram:
    return prefill(llava, llava.make_inputs())


def oracle(family: Family, inputs: Inputs, **options: Any) -> hooked.Pruned:
    options = {"retain": RETAIN, "kv_layout": "uniform", **options}
    return hooked.pruned_forward(family.model, inputs, **options)


def assert_same(output: Any, wanted: hooked.Pruned) -> None:
    logits, layers = output
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    assert [keys.shape[2] for keys, _ in layers] == wanted.kv_lengths
    for (keys, values), wanted_keys, wanted_values in zip(
        layers, wanted.keys, wanted.values, strict=True
    ):
        torch.testing.assert_close(keys, wanted_keys, **CLOSE)
        torch.testing.assert_close(values, wanted_values, **CLOSE)


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
    told = dartfx.exported_pruning(alone)
    assert told is not None
    assert told.kv_layout == "none returned"


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


LENGTH = {"input_ids": {1: Dim("length", min=20, max=300)}}
LENGTH |= {"attention_mask": LENGTH["input_ids"], "pixel_values": None}


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
    told = dartfx.exported_pruning(pruned)
    assert told is not None
    assert told.kept == 8  # logits, 3 layers of keys and values, image features


@pytest.mark.slow
def test_several_stages(llava: Family, program: ExportedProgram) -> None:
    """Two cuts of an exported program keep what the same two keep under torch.compile."""
    inputs = llava.make_inputs()
    options = {"layer": [1, 2], "retain_tokens": [10, 4], "kv_layout": "layered"}
    pruned = dartfx.prune_exported(program, **options, tokens=True)
    told = dartfx.exported_pruning(pruned)
    assert told is not None
    assert (told.layers, told.sequence) == ((1, 2), (29, 17))
    compiled = torch.compile(llava.model, backend="dart", options=options | {"lowering": "eager"})
    with torch.no_grad():
        wanted = compiled(**inputs)
    (logits, layers), keep = pruned.module()(**inputs)
    torch.testing.assert_close(logits, wanted.logits, **CLOSE)
    assert [k.shape[2] for k, _ in layers] == [29, 23, 17]
    ids = inputs["input_ids"].gather(1, keep)
    assert keep.shape == (1, 17)
    assert int((ids == llava.image_token_id).sum()) == 4


def test_what_changed_is_stated_and_travels(llava: Family, program: ExportedProgram) -> None:
    pruned = dartfx.prune_exported(program, retain_tokens=RETAIN, selector="uniform")
    told = dartfx.exported_pruning(pruned)
    assert told is not None
    assert (told.layers, told.vision_tokens, told.retained) == ((2,), 16, RETAIN)
    assert told.kept is None
    assert (told.sequence, told.kv_layout) == ((29, 19), "uniform")
    assert [o.name for o in told.outputs][:3] == ["[0]", "[1][0][0]", "[1][0][1]"]
    assert told.outputs[0].dims == (1,)
    assert told.outputs[0].before == ("1", "29", "200")
    assert told.outputs[0].after == ("1", "19", "200")
    config = dartfx.DartConfig(retain_tokens=RETAIN, selector="uniform", kernel="torch")
    assert (
        told.fingerprint
        == dartfx.DartConfig.from_options(
            {"retain_tokens": RETAIN, "selector": "uniform", "kernel": "torch"}
        ).fingerprint()
        == config.fingerprint()
    )
    assert "29 -> 19 tokens" in str(told)
    assert dartfx.exported_pruning(program) is None
    (report,) = dartfx.reports()
    assert report.pruned

    inputs = llava.make_inputs()
    again = reloaded(pruned)
    assert dartfx.exported_pruning(again) == told
    torch.testing.assert_close(again.module()(**inputs), pruned.module()(**inputs))


def reloaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def test_a_loaded_program_can_be_pruned(llava: Family, program: ExportedProgram) -> None:
    inputs = llava.make_inputs()
    pruned = dartfx.prune_exported(reloaded(program), retain_tokens=RETAIN)
    assert_same(pruned.module()(**inputs), oracle(llava, inputs))


def test_the_program_given_is_left_alone(llava: Family) -> None:
    exported = export(Prefill(llava.model), llava.make_inputs("pad2"), dynamic=LENGTH)
    env = next(n for n in exported.graph.nodes if n.name == "input_ids").meta["val"].fake_mode

    def everything() -> tuple[object, ...]:
        known = env.shape_env
        symbols = sorted(map(str, known.var_to_range))
        metadata = [(n.name, sorted(n.meta), str(n.meta.get("val"))) for n in exported.graph.nodes]
        return str(exported), metadata, symbols, list(map(str, known.guards))

    before = everything()
    dartfx.prune_exported(exported, retain_tokens=RETAIN)
    assert everything() == before


def test_grad_mode_regions_survive(llava: Family) -> None:
    """Exported where gradients are on, rotary tables are a region of their own."""
    inputs = llava.make_inputs()
    exported = export(Prefill(llava.model), inputs, grad=True)
    assert "wrap_with_set_grad_enabled" in str(exported)
    pruned = reloaded(dartfx.prune_exported(exported, retain_tokens=RETAIN))
    assert "wrap_with_set_grad_enabled" in str(pruned)
    assert_same(pruned.module()(**inputs), oracle(llava, inputs))


# torch copies a signature that holds what it warns of.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is dep:FutureWarning")
def test_unflattened_it_is_the_same(llava: Family, program: ExportedProgram) -> None:
    inputs = llava.make_inputs()
    pruned = dartfx.prune_exported(program, retain_tokens=RETAIN)
    assert_same(torch.export.unflatten(pruned)(**inputs), oracle(llava, inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering": "eager"}, r"lowering has no meaning.*aoti_compile_and_package"),
        ({"inductor": {}}, "inductor has no meaning"),
        ({"mode": "default"}, "mode has no meaning"),
        ({"outline_layers": True}, "outline_layers has no meaning"),
        ({"check_ranks": True}, "check_ranks has no meaning"),
        ({"kernel": "triton"}, "kernel='triton' has no meaning"),
        ({"retain_token": 3}, "did you mean 'retain_tokens'"),
    ],
)
def test_options_without_meaning(
    program: ExportedProgram, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(dartfx.ConfigError, match=message):
        dartfx.prune_exported(program, **options)


def test_only_programs(llava: Family) -> None:
    with pytest.raises(TypeError, match=r"what torch.export.export returns, got Llava"):
        dartfx.prune_exported(llava.model)


def test_never_silently_unpruned(llava: Family, program: ExportedProgram) -> None:
    unsupported = dartfx.UnsupportedGraphError
    with pytest.raises(unsupported, match="layer=7, but the decoder stack"):
        dartfx.prune_exported(program, layer=7)
    with pytest.raises(unsupported, match="nothing to drop: 16 tokens to retain of 16"):
        dartfx.prune_exported(program, retain_tokens=16)
    with pytest.warns(dartfx.PruningWarning, match="nothing to drop"):
        assert dartfx.prune_exported(program, retain_tokens=16, on_unsupported="warn") is program
    assert dartfx.prune_exported(program, layer=7, on_unsupported="ignore") is program

    text = llava.make_inputs("text")
    exported = export(llava.model, text | {"use_cache": False})
    with pytest.raises(unsupported, match="no vision tokens enter a decoder in this program"):
        dartfx.prune_exported(exported)


def test_refuses_kept_module_signatures(llava: Family) -> None:
    path = "model.model.language_model.layers.2.mlp"
    exported = export(
        Prefill(llava.model), llava.make_inputs(), preserve_module_call_signature=(path,)
    )
    with pytest.raises(dartfx.UnsupportedGraphError, match=r"layers\.2\.mlp"):
        dartfx.prune_exported(exported, retain_tokens=RETAIN)


def test_a_row_of_too_few_vision_tokens_is_named(llava: Family) -> None:
    inputs = llava.make_inputs("pad2")
    pruned = dartfx.prune_exported(prefill(llava, inputs), retain_tokens=RETAIN)
    with pytest.raises(RuntimeError, match="row 0"):
        pruned.module()(**uneven(llava, inputs))


def uneven(family: Family, inputs: Inputs) -> Inputs:
    """The same batch with two vision tokens less in row 0 and two more in row 1."""
    ids, image = inputs["input_ids"].clone(), family.image_token_id
    ids[0, (ids[0] == image).nonzero()[-2:]] = 5
    last = int((ids[1] == image).nonzero()[-1])
    ids[1, last + 1 : last + 3] = image
    return inputs | {"input_ids": ids}


def test_dump(program: ExportedProgram, tmp_path: Path) -> None:
    dartfx.prune_exported(program, retain_tokens=RETAIN, dump=tmp_path)
    (folder,) = tmp_path.glob("graph_*")
    names = {file.name for file in folder.iterdir()}
    assert {"00_exported.txt", "01_normalise.txt", "report.txt", "report.html"} <= names
    assert "repro.py" not in names
    assert json.loads((folder / "report.json").read_text())["retained"] == RETAIN
