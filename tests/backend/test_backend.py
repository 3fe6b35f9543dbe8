"""The backend apart from the pruning itself: options, refusals, masks, shapes."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import dartfx
from dartfx.passes.outcome import Pruned, Unchanged
from dartfx.passes.refusal import Declined
from dartfx.runtime import vision_mask
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.families import BARE, bare, called
from tests.support.plain.decoders import Decoder, Sizes, assert_same, prompt
from tests.support.tolerances import CLOSE, RETAIN


@pytest.fixture(scope="module")
def llava() -> Family:
    return called("llava")


def unpruned(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of the same graph without dartfx."""
    logits: Tensor = torch.compile(family.model, backend="eager", fullgraph=True)(**inputs).logits
    torch._dynamo.reset()
    return logits


def outcomes(kind: type) -> list[Any]:
    return [r.outcome for r in dartfx.reports() if isinstance(r.outcome, kind)]


# --- options --------------------------------------------------------------------------------


def test_backend_is_known_without_importing_dartfx() -> None:
    code = (
        "import sys, torch\n"
        "assert 'dart' in torch._dynamo.list_backends()\n"
        "f = torch.compile(lambda x: x + 1, backend='dart', options={'lowering': 'eager'})\n"
        "assert f(torch.ones(2)).tolist() == [2.0, 2.0]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_bad_option_is_named_at_the_first_call(llava: Family) -> None:
    fast = torch.compile(llava.model, backend="dart", options={"retian_tokens": 6})
    with pytest.raises(
        BackendCompilerFailed, match=r"unknown option 'retian_tokens'.*retain_tokens"
    ):
        fast(**llava.make_inputs())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
        ({"options": {"inductor": {"cpp.threads": 3}}}, {"cpp.threads": 3}),
        (
            {"options": {"mode": "max-autotune", "inductor": {"triton.cudagraphs": False}}},
            {"max_autotune": True, "triton.cudagraphs": False},
        ),
    ],
    ids=["mode", "inductor", "both"],
)
def test_mode_and_inductor_options_reach_inductor(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], expected: dict[str, object]
) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[dict[str, object]] = []

    def record(module: Any, inputs: Any, **settings: Any) -> Any:
        seen.append(settings["config_patches"])
        return module.forward

    monkeypatch.setattr(inductor, "compile_fx", record)
    torch.compile(lambda x: x + 1, backend="dart", **arguments)(torch.ones(2))
    (patches,) = seen
    assert expected.items() <= patches.items()


# --- identity and refusals ------------------------------------------------------------------


def test_retaining_all_is_the_identity_and_says_so(
    llava: Family, caplog: pytest.LogCaptureFixture
) -> None:
    retain = 40
    inputs = llava.make_inputs()
    plain = unpruned(llava, inputs)
    with caplog.at_level(logging.WARNING, logger="dartfx"):
        kept = bare(llava, retain_tokens=retain)(**inputs).logits
    assert torch.equal(kept, plain)
    assert not outcomes(Pruned)
    (said,) = [o.because for o in outcomes(Unchanged) if "to retain" in o.because]
    assert said == f"nothing to drop: {retain} tokens to retain of 16"
    assert said in caplog.text


@pytest.mark.parametrize("policy", ["warn", "error", "ignore"])
def test_a_refusal_follows_on_unsupported(policy: str) -> None:
    model, inputs = Decoder().eval(), prompt(Sizes())
    options = {**BARE, "layer": 9, "on_unsupported": policy}
    fast = torch.compile(model, backend="dart", fullgraph=True, options=options)
    message = r"(?s)layer=9, but the decoder stack .*layers has \d layers here.*: a layer from 0 to"
    if policy == "error":
        with pytest.raises(BackendCompilerFailed, match=message) as failed:
            fast(**inputs)
        assert isinstance(failed.value.inner_exception, dartfx.UnsupportedGraphError)
        return
    if policy == "warn":
        with pytest.warns(dartfx.PruningWarning, match=message):
            outputs = fast(**inputs)
    else:
        outputs = fast(**inputs)
    (declined,) = outcomes(Declined)
    assert "layer=9" in declined.because
    assert_same(outputs, model(**inputs), rtol=0, atol=0)


def test_a_static_cache_is_refused(llava: Family) -> None:
    inputs = llava.make_inputs()
    expected = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    llava.model.compile(backend="dart", options=BARE)
    try:
        with pytest.warns(dartfx.PruningWarning, match="the cache is static"):
            ids = llava.model.generate(
                **inputs, max_new_tokens=4, do_sample=False, cache_implementation="static"
            )
    finally:
        llava.model._compiled_call_impl = None
    assert torch.equal(ids, expected)


def test_ragged_rows_with_caches_fail_naming_the_row(llava: Family) -> None:
    with pytest.raises(
        dartfx.SelectionError, match=r"row \d of this batch does not hold its share"
    ):
        bare(llava)(**llava.make_inputs("ragged"))


def test_ragged_rows_without_caches(llava: Family) -> None:
    inputs = llava.make_inputs("ragged")
    oracle = hooked.pruned_forward(llava.model, inputs, retain=RETAIN, kv_layout="uniform")
    output = bare(llava)(**inputs, use_cache=False)
    torch.testing.assert_close(output.logits, oracle.logits, **CLOSE)


# --- which calls are pruned -----------------------------------------------------------------


def test_text_of_the_same_shape_stays_exact(llava: Family) -> None:
    """Across graph breaks in ``test_sizes.py``."""
    image, text = llava.make_inputs(), llava.make_inputs("text")
    assert image["input_ids"].shape == text["input_ids"].shape
    plain = llava.model(**text).logits
    fast = bare(llava)
    for _ in range(2):
        assert fast(**image).logits.shape[1] < plain.shape[1]
        torch.testing.assert_close(fast(**text).logits, plain, **CLOSE)


def embedded(family: Family, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The prompt as embeddings that the caller merged, and its vision mask."""
    ids = inputs["input_ids"]
    mask = ids == family.image_token_id
    embeds = family.model.get_input_embeddings()(ids).clone()
    features = family.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[mask] = torch.cat(list(features), 0).reshape(-1, embeds.shape[-1])
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, mask


@pytest.mark.parametrize("first", ["given", "plain"])
def test_given_vision_tokens(llava: Family, first: str) -> None:
    inputs = llava.make_inputs()
    oracle = hooked.pruned_forward(llava.model, inputs, retain=RETAIN, kv_layout="uniform")
    embeds, mask = embedded(llava, inputs)
    plain = llava.model(**embeds).logits
    fast = bare(llava)
    if first == "plain":
        torch.testing.assert_close(fast(**embeds).logits, plain, **CLOSE)
    for _ in range(2):
        with dartfx.vision_tokens(mask):
            torch.testing.assert_close(fast(**embeds).logits, oracle.logits, **CLOSE)
        torch.testing.assert_close(fast(**embeds).logits, plain, **CLOSE)
    (pruned,) = outcomes(Pruned)
    assert pruned.how == "given"


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(1, 3), [[True]]])
def test_vision_tokens_wants_a_bool_mask(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"vision_tokens needs a bool tensor \[B, S\]"):
        dartfx.vision_tokens(mask).__enter__()


def test_a_note_lives_and_dies_with_its_embeddings() -> None:
    embeds, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    vision_mask.record(embeds, mask, 3)
    found = vision_mask.find(embeds)
    assert found is not None
    assert found.mask is mask
    assert vision_mask.find(embeds.clone()) is None
    embeds.add_(1)
    assert vision_mask.find(embeds) is None, "written to since: the note is stale"
    vision_mask.record(embeds, mask, 3)
    del embeds, found
    gc.collect()
    assert len(vision_mask._records) == 0


def test_two_models_in_one_process(llava: Family) -> None:
    other = load("llava", seed=5, layers=3)
    expected = [
        hooked.pruned_forward(f.model, f.make_inputs(), retain=r, kv_layout="uniform").logits
        for f, r in ((llava, RETAIN), (other, 9))
    ]
    fast = bare(llava), bare(other, retain_tokens=9)
    for _ in range(2):
        for model, logits in zip(fast, expected, strict=True):
            torch.testing.assert_close(model(**llava.make_inputs()).logits, logits, **CLOSE)


def test_another_selector(llava: Family) -> None:
    inputs = llava.make_inputs()
    fast = bare(llava, selector="random")

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out: Tensor = fast(**inputs).logits
        return out

    first, again, other = logits(1), logits(1), logits(2)
    assert first.shape[1] == inputs["input_ids"].shape[1] - llava.tokens_per_image + RETAIN
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_gradients_reach_what_was_kept(llava: Family) -> None:
    inputs = llava.make_inputs()
    embeds, mask = embedded(llava, inputs)

    def gradient(call: Any) -> Tensor:
        leaf = embeds["inputs_embeds"].detach().clone().requires_grad_()
        call(leaf).logits.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    fast = torch.compile(
        llava.model, backend="dart", options={"retain_tokens": RETAIN, "lowering": "aot_eager"}
    )
    with dartfx.vision_tokens(mask):
        found = gradient(lambda e: fast(inputs_embeds=e, attention_mask=embeds["attention_mask"]))
    kept = hooked.pruned_forward(llava.model, inputs, retain=RETAIN, kv_layout="uniform").keep_idx
    assert torch.isfinite(found).all()
    assert (found[0, kept[0]].abs().sum(-1) > 0).all()
