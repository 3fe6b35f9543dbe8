"""Pruning in several stages, against an eager model pruned by hooks stage by stage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.families import tower_outside
from tests.support.plain.decoders import Decoder, Sizes, prompt, run
from tests.support.plain.decoders import assert_same as same_tensors
from tests.support.plain.staged import Stages
from tests.support.slow import slow
from tests.support.tolerances import CLOSE

LAYERS, RETAIN = [1, 2, 3], [9, 6, 3]
OPTIONS = {
    "layer": LAYERS,
    "retain_tokens": RETAIN,
    "lowering": "eager",
    "on_unsupported": "error",
}


def warmed(name: str) -> Family:
    """After a first call, in which transformers sets up hooks that would break the graph."""
    family = load(name, layers=4)
    family.model(**family.make_inputs())
    tower_outside(family.model)
    return family


@pytest.fixture(scope="module", params=["llava", *slow("qwen2_5_vl", "gemma3")])
def family(request: pytest.FixtureRequest) -> Family:
    return warmed(request.param)


@pytest.fixture(scope="module")
def llava() -> Family:
    return warmed("llava")


def compiled(family: Family, dynamic: bool | None = None, **options: Any) -> Any:
    """In one graph, where dynamo does not break the model's forward."""
    return torch.compile(
        family.model,
        backend="dart",
        fullgraph=family.name != "qwen2_5_vl",
        dynamic=dynamic,
        options={**OPTIONS, **options},
    )


def pruned() -> Pruned:
    (outcome,) = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    return outcome


def assert_same(output: Any, oracle: Any) -> None:
    torch.testing.assert_close(output.logits, oracle.logits, **CLOSE)
    entries = output.past_key_values.layers, oracle.past_key_values.layers
    for one, other in zip(*entries, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **CLOSE)
        torch.testing.assert_close(one.values, other.values, **CLOSE)


@pytest.mark.parametrize(
    ("family", "variant", "layout"),
    [
        ("llava", "one", "layered"),
        ("llava", "pad2", "uniform"),
        *slow(("qwen2_5_vl", "pad2", "uniform"), ("gemma3", "one", "layered")),
    ],
    indirect=["family"],
)
def test_forward(family: Family, variant: str, layout: str) -> None:
    inputs = family.make_inputs(variant)
    if variant == "one":
        del inputs["attention_mask"]
    stages = Stages(family.model, inputs, LAYERS, RETAIN)
    with stages(layout == "uniform"):
        oracle = family.model(**inputs)
    assert_same(compiled(family, kv_layout=layout)(**inputs), oracle)
    before = inputs["input_ids"].shape[1]
    lengths = [keep.shape[1] for keep in stages.keep_idx]
    assert [cut.sequence for cut in pruned().cuts] == list(
        zip([before, *lengths], lengths, strict=False)
    )
    assert [(c.layer, c.retained) for c in pruned().cuts] == list(zip(LAYERS, RETAIN, strict=True))


def generate(model: Any, inputs: dict[str, Tensor]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_generate(family: Family) -> None:
    inputs = family.make_inputs()
    dartfx.compile(family.model, **OPTIONS)
    try:
        output = generate(family.model, inputs)
    finally:
        family.model._compiled_call_impl = None
    uniform = pruned().kv_layout == "uniform"
    with Stages(family.model, inputs, LAYERS, RETAIN)(uniform):
        oracle = generate(family.model, inputs)
    assert torch.equal(output.sequences, oracle.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(oracle.logits), **CLOSE)
    assert pruned().retained == RETAIN[-1]


@pytest.mark.slow
def test_rows_of_unequal_images(llava: Family) -> None:
    """Such a batch loses pads, so decode needs the mask's columns of all stages together."""
    inputs = llava.make_inputs("ragged")
    dartfx.compile(llava.model, **OPTIONS)
    try:
        output = generate(llava.model, inputs)
    finally:
        llava.model._compiled_call_impl = None
    with Stages(llava.model, inputs, LAYERS, RETAIN)(uniform=True):
        oracle = generate(llava.model, inputs)
    assert torch.equal(output.sequences, oracle.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(oracle.logits), **CLOSE)


@pytest.mark.slow
def test_through_inductor() -> None:
    """What the graph computes without it, which ``test_forward`` compares with the hooks."""
    z = Sizes(layers=4)
    model, inputs = Decoder(z).eval(), prompt(z)
    options = {"layer": LAYERS, "retain_tokens": RETAIN}
    eager, outcome = run(model, inputs, **options)
    assert isinstance(outcome, Pruned)
    torch._dynamo.reset()
    inductor, outcome = run(model, inputs, lowering="inductor", **options)
    assert isinstance(outcome, Pruned)
    assert [cut.retained for cut in outcome.cuts] == RETAIN
    same_tensors(inductor, eager)


def test_kept_tokens_are_those_of_the_last_stage(llava: Family) -> None:
    inputs = llava.make_inputs("pad2")
    stages = Stages(llava.model, inputs, LAYERS, RETAIN)
    with stages(uniform=True):
        llava.model(**inputs)
    compiled(llava, tokens=True, kv_layout="uniform")(**inputs)
    for row, found in enumerate(dartfx.kept_tokens()):
        positions = [found.positions[i] for i in found.kept]
        left = stages.kept(3)[row].tolist()
        assert positions == [p for p in left if p in found.positions]
        assert len(positions) == RETAIN[-1]
        picked = {i for pick in found.picks for i in pick.kept}
        assert picked == set(found.kept), "every kept token was picked by a pivot of the last cut"


def test_a_stage_that_drops_nothing_is_left_out(llava: Family) -> None:
    inputs = llava.make_inputs()
    output = compiled(llava, retain_tokens=[99, 6, 3])(**inputs)
    assert [(c.layer, c.vision_tokens, c.retained) for c in pruned().cuts] == [
        (2, 16, 6),
        (3, 6, 3),
    ]
    with Stages(llava.model, inputs, LAYERS[1:], [6, 3])(uniform=True):
        oracle = llava.model(**inputs)
    assert_same(output, oracle)


@pytest.mark.slow
def test_other_lengths_add_no_graph(llava: Family) -> None:
    fast = compiled(llava, dynamic=True)
    graphs = []
    for words in (3, 5, 9):
        inputs = llava.make_inputs()
        more = torch.full((1, words), 7)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with Stages(llava.model, inputs, LAYERS, RETAIN)(uniform=True):
            oracle = llava.model(**inputs)
        assert_same(fast(**inputs), oracle)
        graphs.append(len(dartfx.reports()))
    assert len(set(graphs)) == 1, "every length ran what the first one compiled"
    assert pruned().retained == RETAIN[-1]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("kimi_k25", 1),
        ("qwen3_vl", 1),
        *slow(("llava", 1), ("gemma4", 1), ("kimi_k25", 2), ("gemma4", 2)),
    ],
)
def test_verify(name: str, steps: int) -> None:
    """Where caches hold no keys, features enter between layers, or windows slide, too."""
    family = load(name)
    options = {"layer": LAYERS, "retain_tokens": RETAIN}
    inputs = family.make_inputs()
    found = dartfx.verify(family.model.generate, options=options, **inputs, max_new_tokens=steps)
    assert found.ok, str(found)
    assert "tokens before layer 1, 2, 3: verified" in str(found)


@pytest.mark.parametrize("family", ["llava", *slow("qwen2_5_vl")], indirect=True)
def test_dump_of_every_stage(family: Family, tmp_path: Path) -> None:
    """In one graph and, for a model that dynamo breaks, in the graph that waits for its mask."""
    options = {"layer": [1, 3], "retain_tokens": [9, 3], "dump": str(tmp_path)}
    with torch.no_grad():
        compiled(family, **options)(**family.make_inputs())
    (folder,) = {f.parent for f in tmp_path.glob("*/*check_2.txt")}
    names = [f.stem.partition("_")[2] for f in sorted(folder.glob("[0-9]*.txt"))]
    once = ["axes", "insert", "gather", "shrink", "trim_cache", "check"]
    stages = [*once, "locate_2", *(f"{name}_2" for name in once)]
    assert names[-14:] == ["locate", *stages]
    page = (folder / "report.html").read_text()
    assert len(re.findall(r'class="cut" x1="([\d.]+)"', page)) == 2
    as_json = json.loads((folder / "report.json").read_text())
    assert [cut["retained"] for cut in as_json["cuts"]] == [9, 3]
    assert (as_json["layer"], as_json["retained"]) == (1, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": [2, 3]}, "has 2 and reduction_ratio=0.778 has 1 values"),
        ({"layer": [2, 3], "retain_tokens": 4}, "has 2 and retain_tokens=4 has 1 values"),
        ({"layer": 2, "retain_tokens": [4, 3]}, "has 1 and retain_tokens=(4, 3) has 2 values"),
        ({"layer": [3, 2], "retain_tokens": [4, 3]}, "must ascend"),
        ({"layer": [2, 3], "retain_tokens": [4, 4]}, "must fall from stage to stage"),
        ({"layer": [2, 3], "reduction_ratio": [0.5, 0.4]}, "must rise from stage to stage"),
        ({"layer": [], "retain_tokens": []}, "must hold a value for each stage"),
        ({"layer": [2, 3], "retain_tokens": [4, None]}, "retain_tokens[1] must be an int"),
        ({"layer": [2, 0], "retain_tokens": [4, 3]}, "must ascend"),
    ],
)
def test_stages_that_contradict_one_another(options: dict[str, Any], said: str) -> None:
    with pytest.raises(dartfx.ConfigError) as error:
        dartfx.DartConfig.from_options(options)
    assert said in str(error.value)


def test_one_stage_in_a_list_is_that_stage() -> None:
    listed = dartfx.DartConfig.from_options({"layer": [3], "retain_tokens": [64]})
    plain = dartfx.DartConfig.from_options({"layer": 3, "retain_tokens": 64})
    assert listed == plain
    assert listed.fingerprint() == plain.fingerprint()


def test_ratios_are_of_the_prompts_tokens() -> None:
    config = dartfx.DartConfig(layer=(2, 8, 16), reduction_ratio=(0.5, 0.75, 0.875))
    assert [config.retain_for(576, stage) for stage in range(3)] == [288, 144, 72]
