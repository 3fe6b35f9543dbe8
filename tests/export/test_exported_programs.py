"""What a pruned program records, what is refused, and what stays unchanged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import dartfx
from dartfx.tools.zoo.family import Family
from tests.support.exporting import LENGTH, Prefill, assert_same, export, oracle, prefill, uneven
from tests.support.tolerances import RETAIN


def test_what_changed_is_stated_and_travels(llava: Family, program: ExportedProgram) -> None:
    pruned = dartfx.prune_exported(program, retain_tokens=RETAIN, selector="uniform")
    pruning = dartfx.exported_pruning(pruned)
    assert pruning is not None
    assert (pruning.layers, pruning.vision_tokens, pruning.retained) == ((2,), 16, RETAIN)
    assert pruning.kept is None
    assert (pruning.sequence, pruning.kv_layout) == ((29, 19), "uniform")
    assert [o.name for o in pruning.outputs][:3] == ["[0]", "[1][0][0]", "[1][0][1]"]
    assert pruning.outputs[0].dims == (1,)
    assert pruning.outputs[0].before == ("1", "29", "200")
    assert pruning.outputs[0].after == ("1", "19", "200")
    config = dartfx.DartConfig(retain_tokens=RETAIN, selector="uniform", kernel="torch")
    assert (
        pruning.fingerprint
        == dartfx.DartConfig.from_options(
            {"retain_tokens": RETAIN, "selector": "uniform", "kernel": "torch"}
        ).fingerprint()
        == config.fingerprint()
    )
    assert "29 -> 19 tokens" in str(pruning)
    assert dartfx.exported_pruning(program) is None
    (report,) = dartfx.reports()
    assert report.pruned

    inputs = llava.make_inputs()
    again = reloaded(pruned)
    assert dartfx.exported_pruning(again) == pruning
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
        ({"lowering": "eager"}, r"lowering does not apply.*aoti_compile_and_package"),
        ({"inductor": {}}, "inductor does not apply"),
        ({"mode": "default"}, "mode does not apply"),
        ({"outline_layers": True}, "outline_layers does not apply"),
        ({"check_ranks": True}, "check_ranks does not apply"),
        ({"kernel": "triton"}, "kernel='triton' does not apply"),
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


def test_dump(program: ExportedProgram, tmp_path: Path) -> None:
    dartfx.prune_exported(program, retain_tokens=RETAIN, dump=tmp_path)
    (folder,) = tmp_path.glob("graph_*")
    names = {file.name for file in folder.iterdir()}
    assert {"00_exported.txt", "01_normalise.txt", "report.txt", "report.html"} <= names
    assert "repro.py" not in names
    assert json.loads((folder / "report.json").read_text())["retained"] == RETAIN
