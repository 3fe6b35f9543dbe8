"""dartfx.passes as a library: public API, external selections, audio, examples."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx import passes
from dartfx.errors import SelectionError
from dartfx.tools.zoo import hooked
from tests.support.plain.decoders import Decoder, Sizes, Style, prompt, pruned_by_hand
from tests.support.tolerances import CLOSE

EXAMPLES = Path(__file__).parents[2] / "examples"

# A change here raises the version.
SURFACE = {
    "VERSION": "(0, 6)",
    "ByOperator": (
        "(operator, args=..., queries=..., reads=..., checks_ranks=..., more=..., "
        "tower_attention=...)"
    ),
    "Declined": "(because, where=..., advice=..., may_retry_with_graph_breaks=...)",
    "Emitter": "(anchor)",
    "Given": "(index=...)",
    "Pruned": (
        "(stack, how, batch, cuts, kv_layout, flops, kv_bytes, seconds=..., order_mixing=...)"
    ),
    "Refusal": "(because, node=..., advice=..., may_retry_with_graph_breaks=...)",
    "Request": (
        "(stages, kv_layout=..., fixes_sliding_lengths=..., gathers_decode_mask=..., "
        "order_mixing=..., merge=..., calibrate=..., always=...)"
    ),
    "SelectionInputs": (
        "(normed, keys, vision_mask, valid, vision_tokens, retain, queries, tower_attention)"
    ),
    "Stage": "(layer, retain, select, given=...)",
    "Unchanged": "(because, all_retained=..., unsure=...)",
    "normalise": "(module, examples=..., extra=...)",
    "prune": "(module, request, vision=..., observe=...)",
}


def shown(value: Any) -> str:
    """How a caller may call it: names of arguments, and which may be left out."""
    if isinstance(value, tuple):
        return str(value)
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return ""
    taken = inspect.signature(value).parameters.values()
    return f"({', '.join(p.name + '=...' * (p.default is not p.empty) for p in taken)})"


def test_the_surface_changes_only_on_purpose() -> None:
    assert {name: shown(getattr(passes, name)) for name in passes.__all__} == SURFACE


@pytest.mark.parametrize("name", sorted(set(SURFACE) - {"VERSION"}))
def test_the_surface_is_documented(name: str) -> None:
    found = getattr(passes, name)
    assert found.__doc__
    # A dataclass without a docstring gets its signature as one.
    assert not found.__doc__.startswith(f"{name}(")
    assert f"`{name}`" in (EXAMPLES.parent / "docs" / "library.md").read_text()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    dartfx.reset()
    yield importlib.import_module
    for name in ("own_selection", "audio_tokens", "stages"):
        sys.modules.pop(name, None)


def test_own_selection(example: Any) -> None:
    module = example("own_selection")
    pruned, kept, logits = module.main()
    model, inputs = module.model_and_inputs()
    vision = inputs["input_ids"] == module.IMAGE
    stays = torch.arange(vision.shape[1])[(~vision | kept)[0]][None]
    oracle = hooked.pruned_forward(
        model, inputs, layer=module.LAYER, retain=0, selector=lambda selection_inputs, retain: stays
    )
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)
    assert pruned.sequence == (vision.shape[1], stays.shape[1])
    unpruned = model(**inputs).logits[:, -1]
    assert not torch.allclose(logits[:, -1], unpruned, **CLOSE), "the choice makes a difference"


@pytest.mark.slow
def test_audio_tokens(example: Any) -> None:
    module = example("audio_tokens")
    tokens, report = module.main(lowering="eager")
    model, inputs = module.model_and_inputs()
    oracle = hooked.pruned_generate(
        model,
        inputs,
        layer=module.LAYER,
        retain=module.RETAIN,
        max_new_tokens=8,
        image_token_id=module.AUDIO,
        kv_layout="uniform",
    )
    assert torch.equal(tokens[:, -8:], oracle.token_ids)
    assert (report.outcome.vision_tokens, report.outcome.retained) == (64, 16)


@pytest.mark.slow
def test_stages_example(example: Any) -> None:
    one, three = example("stages").main(lowering="eager")
    assert [cut.layer for cut in three.cuts] == [1, 2, 4]
    assert three.flops[1] < one.flops[1]


def pruned_by(kept: Tensor, model: Decoder, inputs: dict[str, Tensor], retain: int) -> Any:
    """The model's outputs with these vision tokens kept, through one graph."""
    outcomes = []

    def backend(module: Any, example_inputs: Any) -> Any:
        rewritten = passes.normalise(module, extra=[kept])
        stage = passes.Stage(2, lambda n: retain, passes.Given())
        outcomes.append(passes.prune(rewritten, passes.Request((stage,))))
        if not isinstance(outcomes[-1], passes.Pruned):
            return module.forward
        return lambda *args: rewritten(kept, *args)

    torch._dynamo.reset()
    with torch.no_grad():
        outputs = torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return outputs, outcomes[-1]


def marked(inputs: dict[str, Tensor], *numbers: list[int]) -> Tensor:
    """[B, S] bool: in every row the vision tokens of these numbers."""
    vision = inputs["ids"] == 1
    kept = torch.zeros_like(vision)
    for row, wanted in enumerate(numbers):
        kept[row, vision[row].nonzero()[:, 0][wanted]] = True
    return kept


@pytest.mark.parametrize("batch", [1, 2])
def test_a_given_mask(batch: int) -> None:
    z = Sizes(batch=batch)
    model, inputs = Decoder(z, Style(rope="one_row")).eval(), prompt(z)
    kept = marked(inputs, *[[0, 3, 5], [1, 2, 4]][:batch])
    outputs, outcome = pruned_by(kept, model, inputs, 3)

    def positions(hidden: Tensor, keys: Tensor, vision: Tensor, *_: Any) -> Tensor:
        return torch.stack([row.nonzero()[:, 0] for row in ~vision | kept])

    uniform = outcome.kv_layout == "uniform"
    with torch.no_grad():
        by_hand = pruned_by_hand(model, inputs, 3, uniform=uniform, select=positions)
    for one, other in zip(outputs, by_hand, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("numbers", [[0, 3], [0, 1, 2, 3]])
def test_another_number_of_marks_is_an_error(numbers: list[int]) -> None:
    model, inputs = Decoder(style=Style(rope="one_row")).eval(), prompt(Sizes())
    with pytest.raises(SelectionError, match=r"the given mask did not keep exactly .* row b = 0"):
        pruned_by(marked(inputs, numbers), model, inputs, 3)


def test_a_mark_on_text_is_an_error() -> None:
    model, inputs = Decoder(style=Style(rope="one_row")).eval(), prompt(Sizes())
    kept = marked(inputs, [0, 3])
    kept[0, 0] = True
    with pytest.raises(SelectionError, match="the given mask"):
        pruned_by(kept, model, inputs, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.long(), "must be bool [B, S]"),
        (lambda m: m[0], "must be bool [B, S]"),
        (lambda m: m[:, 1:], "does not fit a sequence of shape"),
    ],
)
def test_a_mask_of_another_form_is_refused(change: Any, said: str) -> None:
    model, inputs = Decoder(style=Style(rope="one_row")).eval(), prompt(Sizes())
    with torch.no_grad():
        plain = model(**inputs)
    outputs, outcome = pruned_by(change(marked(inputs, [0, 3, 5])), model, inputs, 3)
    assert isinstance(outcome, passes.Declined)
    assert said in outcome.because
    torch.testing.assert_close(outputs[0], plain[0])


def test_neutral_names() -> None:
    neutral = dartfx.DartConfig.from_options({"pivot_media_tokens": 2})
    assert neutral == dartfx.DartConfig(pivot_image_tokens=2)
    with pytest.raises(dartfx.ConfigError, match="are the same option; give one of them"):
        dartfx.DartConfig.from_options({"pivot_media_tokens": 2, "pivot_image_tokens": 2})
    assert dartfx.media_tokens is dartfx.vision_tokens
