"""Selectors that request queries: their inputs, compared with the models' own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.backend import rewrite
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from dartfx.selection import registry
from dartfx.selection.registry import register_selector
from dartfx.tools.zoo.registry import load
from tests.support.plain import spellings
from tests.support.plain.decoders import Decoder, Sizes, Style, assert_same, prompt, run
from tests.support.slow import slow
from tests.support.tolerances import RETAIN


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    dartfx.reset()
    yield
    dartfx.reset()


def most_attended(weights: Tensor, vision: Tensor) -> list[list[int]]:
    """weights [B, H, S, S] and vision [B, S]: each row's RETAIN positions of most attention."""
    rows = []
    for row, mask in zip(weights[:, :, -1].double().mean(1).numpy(), vision.numpy(), strict=True):
        places = np.flatnonzero(mask)
        order = sorted(places, key=lambda p: (-row[p], p))
        assert row[order[RETAIN - 1]] - row[order[RETAIN]] > 1e-6, "too close to call"
        rows.append(sorted(int(p) for p in order[:RETAIN]))
    return rows


# Causal without a mask, with a mask, and with the scores in the graph, which always have a mask.
CALLS = [("one", "sdpa"), ("pad2", "sdpa"), ("pad2", "eager")]
# Grouped, with a scale of its own and a soft cap, with a bidirectional prefix.
FURTHER = [
    ("qwen2_vl", "pad2", "sdpa"),
    ("paligemma2", "one", "sdpa"),
    ("aria", "one", "sdpa"),
    ("aria", "pad2", "eager"),
]
SOFT_CAP = ("paligemma2", "pad2", "eager")


@pytest.mark.parametrize(
    ("name", "variant", "attention"),
    [
        *(("llava", *call) for call in CALLS),
        SOFT_CAP,
        *slow(*FURTHER),
    ],
)
def test_fastv_keeps_what_the_model_attends_to(name: str, variant: str, attention: str) -> None:
    family, plain = (
        load(name, layers=3, attn_implementation=attention),
        load(name, layers=3, attn_implementation="eager"),
    )
    inputs = family.make_inputs(variant)
    vision = inputs["input_ids"] == family.image_token_id
    with torch.no_grad():
        output = plain.model(**inputs, output_attentions=True)
        family.model(**inputs)
        dartfx.compile(
            family.model,
            retain_tokens=RETAIN,
            selector="fastv",
            lowering="eager",
            tokens=True,
            on_unsupported="error",
        )
        family.model(**inputs, use_cache=False)
    kept = [[image.positions[i] for i in image.kept] for image in dartfx.kept_tokens()]
    assert kept == most_attended(output.attentions[1], vision)


def seen(name: str = "watching") -> dict[str, Any]:
    """Registers a selector that asks for all there is, and keeps what it was given."""
    given: dict[str, Any] = {}

    def watching(
        hidden: Tensor,
        keys: Tensor,
        vision_mask: Tensor,
        text_mask: Tensor,
        budget: Tensor,
        *,
        queries: Tensor,
        valid_mask: Tensor,
        **pivots: Any,
    ) -> Tensor:
        given.update(queries=queries, keys=keys, valid_mask=valid_mask)
        return vision_mask & (vision_mask.cumsum(1) <= budget[:, None])

    register_selector(name)(watching)
    return given


STYLES = [
    Style(),
    Style(attend="repeated", split="einsum"),
    Style(attend="softmax", mask="4d_float"),
    Style(attend="filled", mask="4d_bool", split="flat_rows"),
    Style(attend="where", mask="4d_bool", rope="one_row"),
]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.attend)
def test_queries_are_those_of_the_layer_before_the_cut(
    style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, calls = seen(), []
    attend = spellings.ATTENDS[style.attend]

    def recorded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append((q, k))
        return attend(q, k, v, mask)

    grouped = style.attend in ("sdpa", "repeated", "softmax")
    model = Decoder(Sizes(batch=2, heads=4, kv_heads=2 if grouped else 4), style).eval()
    inputs = prompt(model.z, (3, 0) if style.mask != "none" else ())
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setitem(spellings.ATTENDS, style.attend, recorded)
        model(**inputs)
    _, outcome = run(model, inputs, retain_tokens=RETAIN, selector="watching")
    assert isinstance(outcome, Pruned), outcome
    torch.testing.assert_close(given["queries"], calls[1][0])
    torch.testing.assert_close(given["keys"], calls[1][1])
    everywhere = torch.ones_like(inputs["ids"], dtype=torch.bool)
    assert torch.equal(given["valid_mask"], inputs.get("valid", everywhere))


SCALES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "times": (lambda scores: scores * 0.5, 0.5),
    "over": (lambda scores: scores / 4.0, 0.25),
    "both, in place": (lambda scores: scores.mul_(3.0) / 12, 0.25),
    "none": (lambda scores: scores, 1.0),
    "capped": (lambda scores: 9.0 * torch.tanh(scores * 0.5 / 9.0), 0.5),
}


def scaled_by(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (change(q @ k.mT) + mask).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("name", SCALES)
def test_queries_carry_the_scale_of_the_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, scale = SCALES[name]
    given, plain = seen(), Decoder(Sizes(), Style(attend="softmax", mask="4d_float")).eval()
    inputs = prompt(plain.z)
    run(plain, inputs, retain_tokens=RETAIN, selector="watching", layer=1)
    own = given["queries"].clone()  # at the usual scale they are passed unchanged
    dartfx.reset()
    monkeypatch.setitem(spellings.ATTENDS, "softmax", scaled_by(change))
    _, outcome = run(plain, inputs, retain_tokens=RETAIN, selector="watching", layer=1)
    assert isinstance(outcome, Pruned), outcome
    # Layer 0's queries do not depend on the scale.
    torch.testing.assert_close(given["queries"], own * scale * plain.z.head_dim**0.5)


def test_the_scale_of_a_fused_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)

    given, model = seen(), Decoder().eval()
    inputs = prompt(model.z)
    run(model, inputs, retain_tokens=RETAIN, selector="watching", layer=1)
    own = given["queries"].clone()
    dartfx.reset()
    monkeypatch.setitem(spellings.ATTENDS, "sdpa", attend)
    run(model, inputs, retain_tokens=RETAIN, selector="watching", layer=1)
    torch.testing.assert_close(given["queries"], own * 0.5 * model.z.head_dim**0.5)


def declined(model: Decoder, text: str) -> None:
    """With queries the graph is refused and left alone; without, it is pruned."""
    inputs = prompt(model.z)
    outputs, outcome = run(model, inputs, retain_tokens=RETAIN, selector="fastv", layer=1)
    assert isinstance(outcome, Declined), outcome
    assert text in outcome.because
    assert "takes no queries" in outcome.advice
    with torch.no_grad():
        assert_same(outputs, model(**inputs), rtol=0, atol=0)
    dartfx.reset()
    _, outcome = run(model, inputs, retain_tokens=RETAIN, selector="dart", layer=1)
    assert isinstance(outcome, Pruned), outcome


def test_a_learned_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.3))
    monkeypatch.setitem(spellings.ATTENDS, "softmax", scaled_by(lambda s: s * temperature))
    model = Decoder(Sizes(), Style(attend="softmax", mask="4d_float")).eval()
    declined(model, "the scale of attention scores is no number of the graph")


def test_queries_in_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # Batch and heads are one dim when the queries become what they are.
        rows = q.reshape(-1, *q.shape[2:]) + 1
        scores = torch.bmm(rows, k.reshape(-1, *k.shape[2:]).mT).view(*q.shape[:3], -1)
        return (scores * 0.3 + mask).softmax(-1) @ v

    monkeypatch.setitem(spellings.ATTENDS, "softmax", attend)
    model = Decoder(Sizes(), Style(attend="softmax", mask="4d_float")).eval()
    declined(model, "queries of the query-key product are not [B, Hq, S, Dh]")


def test_only_selectors_that_ask_have_queries_in_their_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator, found = torch.ops.dartfx.select_tokens.default, {}
    original = rewrite.prune

    def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = original(module, *args, **kwargs)
        for node in module.graph.find_nodes(op="call_function", target=operator):
            found[node.args[8]] = len(node.args)
        return outcome

    monkeypatch.setattr(rewrite, "prune", watched)
    for name in ("dart", "fastv"):
        dartfx.reset()
        run(Decoder().eval(), prompt(Sizes()), retain_tokens=RETAIN, selector=name)
    assert found == {"dart": 10, "fastv": 11}
