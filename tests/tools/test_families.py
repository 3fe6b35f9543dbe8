"""Every family of the zoo through the compiler: pruned as the oracle prunes, or refused.

``python -m dartfx families`` tries more calls of each and prints the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dartfx import compat
from dartfx.cli.main import main
from dartfx.runtime.vision_mask import LOST
from dartfx.tools.zoo import command, hooked, oracle
from dartfx.tools.zoo import measure as measuring
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.measure import CLOSE, Call, Result, measure
from dartfx.tools.zoo.registry import FAMILIES, load
from tests.support.slow import slow
from tests.support.tolerances import TOLERANCES

# What cannot be pruned, and a part of the reason that is given. All others must be.
REFUSED = {
    "ernie4_5_vl_moe": "reads the token axis",  # rows of each token type are packed for experts
    "florence2": "none of its",
    "minimax_m3_vl": "reads the token axis",  # its indexer picks blocks of keys
    "mllama": "none of its",
    "step3p7": "no whole decoder stack",  # its experts are a loop over those that were hit
    "unlimited_ocr": "in a way of their own",  # its cache keeps the prompt apart
}

# Forwards that break into many graphs, so that the mask comes from an earlier one; DeepStack; MoE;
# sliding windows; several rotary tables; keys shared between layers.  Those of LLaVA-NeXT,
# Qwen2.5-VL and InternVL are in test_parity.py and test_shapes.py.
BROKEN_UP = [
    ("chameleon", "one"), ("gemma3", "pad2"), ("gemma4", "pad2"), ("granite_docling", "one"),
    ("kimi_k25", "pad2"), ("llama4", "one"), ("llama4", "pad2"), ("ovis2", "one"),
    ("qwen3_vl", "one"),
]  # fmt: skip

# Decode steps that meet a full window or a new chunk, or keys of another layer.
WINDOWS = ["gemma4", "llama4"]


def checked(name: str, *calls: str, steps: int = 2) -> Result:
    result = measure(name, "", calls=calls, steps=steps)
    for call in result.calls.values():
        if call.status == "absent":
            pytest.skip(call.why)
        assert call.status in ("pruned", "refused"), f"{call.status}: {call.why}\n{call.trace}"
    return result


def test_the_table_names_families() -> None:
    assert set(REFUSED) | set(dict(BROKEN_UP)) | QUICK <= set(FAMILIES)
    assert len(FAMILIES) - len(REFUSED) >= 40


# One of each way to lay out a decoder, and of each reason to refuse it; the others are slow.  Quick
# tests of their own have gemma3 (sliding windows), kimi_k25 and qwen3_vl (stages), qwen2_5_vl
# (parity) and llava_next (positions).
QUICK = {
    "aria", "blip_2", "deepseek_vl", "florence2", "fuyu", "idefics3", "internvl", "lfm2_vl",
    "llava", "ovis2", "paligemma",
}  # fmt: skip
# Laid out as another family, or refused as another is: only the command compiles them.
BUILT = [
    "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "dots3_note", "glm5_next", "inkling",
    "inkling2", "kosmos_2_5", "minicpm_ocr", "minicpmv4_7", "mistral_large4", "muse_glimmer",
    "muse_spark", "qwen4_exp",
]  # fmt: skip
ALL = [name if name in QUICK else slow(name)[0] for name in FAMILIES if name not in BUILT]


@pytest.mark.parametrize("name", ALL)
def test_generate(name: str) -> None:
    call = checked(name, "generate", steps=8 if name in WINDOWS else 2).calls["generate"]
    if name in REFUSED:
        assert call.status == "refused"
        assert REFUSED[name] in call.why
        assert call.difference == pytest.approx(0.0, abs=TOLERANCES[torch.float32]["atol"])
    else:
        assert call.status == "pruned", call.why
        assert call.crossings


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), BROKEN_UP)
def test_forward_of_one_prompt_or_a_padded_pair(name: str, variant: str) -> None:
    """One prompt is for a bare torch.compile, without a mask; a pair for dartfx.compile."""
    call = checked(name, variant).calls[variant]
    assert call.status == "pruned", call.why
    assert call.moved is not None
    assert call.moved > (0.05 if variant == "one" else 50 * CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_a_family_answers_to_its_image(name: str) -> None:
    try:
        family = load(name)
    except (AttributeError, ImportError) as error:
        pytest.skip(str(error))
    inputs = family.make_inputs("pad2")
    pixels = next(n for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point())
    other = inputs | {pixels: inputs[pixels].flip(-1)}
    if pixels == "flattened_patches":  # of which the first two values are a patch's position
        other[pixels] = torch.cat([inputs[pixels][..., :2], inputs[pixels][..., 2:].flip(-1)], -1)
    with torch.no_grad():
        logits, moved = (family.model(**given).logits[:, -1] for given in (inputs, other))
    assert (logits - moved).abs().max() > 50 * CLOSE


def test_what_a_bare_compile_logs_of_a_call_is_no_silence() -> None:
    assert measuring._call_of([], []).status == "SILENT"
    call = measuring._call_of([], [f"{LOST}; try fullgraph=True"])
    assert (call.status, call.why) == ("refused", f"{LOST}; try fullgraph=True")


def test_new_lists_classes_that_no_family_covers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = {
        "git": "GitForCausalLM",  # excluded
        "later": "LaterForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
    }
    name = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    monkeypatch.setitem(vars(compat), name, classes)
    assert main(["families", "--new"]) == 0
    assert capsys.readouterr().out.split() == ["later", "LaterForConditionalGeneration"]


def test_another_selection_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> oracle.Batch:
        batch = oracle.select_batch(*arguments)
        dropped = next(i for i in range(5, 21) if i not in batch.keep_idx[0])
        kept = next(i for i in range(5, 21) if i in batch.keep_idx[0])
        batch.keep_idx[0] = sorted({*batch.keep_idx[0], dropped} - {kept})
        return batch

    monkeypatch.setattr(hooked, "select_batch", other)
    assert measure("llava", "", calls=["generate"], steps=2).status == "WRONG"


def test_a_prompt_without_an_image_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs = Family.make_inputs
    monkeypatch.setattr(Family, "make_inputs", lambda family, _: make_inputs(family, "text"))
    result = measure("llava", "", calls=["generate"], steps=2)
    assert (result.status, result.good) == ("SILENT", False)


@pytest.mark.parametrize(
    ("calls", "status", "good"),
    [
        (["pruned", "pruned"], "pruned", True),
        (["refused", "refused"], "refused", True),
        (["pruned", "refused"], "partly", True),
        (["unsure", "pruned", "pruned"], "partly", True),
        (["unsure", "refused"], "unsure", True),
        (["pruned", "WRONG"], "WRONG", False),
        (["refused", "SILENT"], "SILENT", False),
        (["WRONG", "CRASH"], "CRASH", False),
    ],
)
def test_a_family_is_as_bad_as_its_worst_call(calls: list[str], status: str, good: bool) -> None:
    result = Result("x", "", {str(i): Call(c) for i, c in enumerate(calls)})
    assert (result.status, result.good) == (status, good)


def measured_as(monkeypatch: pytest.MonkeyPatch, **statuses: str) -> None:
    """Let the command see these results instead of compiling anything."""

    def stand_in(name: str, about: str, **_: object) -> Result:
        call = Call(statuses[name], 1e-6, graphs=3, how="merge in the graph", why="because")
        return Result(name, about, {"one": call})

    monkeypatch.setattr(command, "measure", stand_in)


def test_the_command_writes_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_as(monkeypatch, llava="pruned", gemma3="refused")
    page, data = tmp_path / "page.md", tmp_path / "data.json"
    assert main(["families", "llava", "gemma3", "--write", str(page), "--json", str(data)]) == 0
    shown = capsys.readouterr()
    assert "2 families: 1 pruned, 1 refused" in shown.out
    assert "[2/2] gemma3: refused" in shown.err
    assert "| gemma3 |" in page.read_text()
    assert "- **gemma3**, one: because" in page.read_text()
    found = json.loads(data.read_text())["families"]
    assert [f["status"] for f in found] == ["pruned", "refused"]


def test_the_command_fails_when_a_family_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_as(monkeypatch, llava="WRONG")
    assert main(["families", "llava"]) == 1
    assert main(["families", "lava"]) == 2
    assert "unknown: lava" in capsys.readouterr().err
