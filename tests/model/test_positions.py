"""Prompt positions and the shorter sequence: available to callers, refused in later graphs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dartfx
from dartfx.runtime.kept_positions import uses_of_positions
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


@functools.cache
def family(name: str) -> Family:
    return load(name, layers=3)


def compiled(model: Any, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    return dartfx.compile(copy.deepcopy(model), **settings)


# In one graph, and in several.
@pytest.mark.parametrize(
    ("name", "return_dict"),
    [("llava", False), ("llava_next", True), *slow(("llava", True), ("llava_next", False))],
)
@torch.no_grad()
def test_the_output_knows_the_positions_that_are_left(name: str, return_dict: bool) -> None:
    built = family(name)
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    model = compiled(built.model)
    output = model(**inputs, use_cache=False, return_dict=return_dict)
    kept = dartfx.kept_positions(output)
    assert kept is not None
    assert kept.tolist() == oracle.keep_idx.tolist()
    assert dartfx.kept_positions(output[0]) is kept
    assert dartfx.kept_positions(model(**built.make_inputs("text"))) is None


@torch.no_grad()
def test_a_loss_outside_of_the_model_is_the_one_inside() -> None:
    inputs = family("llava").make_inputs()
    labels, model = inputs["input_ids"], compiled(family("llava").model)
    output = model(**inputs)
    kept = dartfx.kept_positions(output)
    assert kept is not None
    outside = F.cross_entropy(output.logits[0, :-1], labels.gather(1, kept)[0, 1:])
    torch.compiler.reset()  # both calls have the same sizes, so dynamo learns none from the first
    torch.testing.assert_close(outside, model(**inputs, labels=labels).loss, **CLOSE)


@torch.no_grad()
def test_the_last_token_of_each_row_and_accuracy_over_labels_by_positions() -> None:
    inputs = family("llava").make_inputs("ragged")
    oracle = hooked.pruned_forward(family("llava").model, inputs, retain=RETAIN)
    output = compiled(family("llava").model)(**inputs)
    kept = dartfx.kept_positions(output)
    assert kept is not None
    places = torch.arange(inputs["input_ids"].shape[1])
    last = (inputs["attention_mask"] * places).argmax(1, keepdim=True)
    assert last.tolist() == oracle.keep_idx.gather(1, torch.searchsorted(kept, last)).tolist()
    rows = torch.arange(len(last))
    pooled = output.logits[rows, torch.searchsorted(kept, last)[:, 0]]
    torch.testing.assert_close(pooled, oracle.logits[:, -1], **CLOSE)
    labels = oracle.logits.argmax(-1)  # what the hook-pruned model says of each token that is left
    full = torch.full(inputs["input_ids"].shape, -100).scatter(1, oracle.keep_idx, labels)
    assert bool((output.logits.argmax(-1) == full.gather(1, kept)).all())


class Embedder(nn.Module):
    """Pools the last valid token of a right-padded row."""

    def __init__(self, model: Any, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Tensor:
        hidden: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **rest
        ).last_hidden_state
        last = attention_mask.sum(1) - 1
        if self.how == "index":
            return hidden[torch.arange(len(hidden)), last]
        if self.how == "the last":
            return hidden[torch.arange(len(hidden)), -1]
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


@pytest.mark.parametrize("how", ["index", *slow("gather")])
@torch.no_grad()
def test_pooling_by_position_behind_a_graph_break_is_refused(how: str) -> None:
    built = family("llava_next")
    inputs = built.make_inputs("one", before=3, after=12)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([inputs[name], torch.zeros(1, 20, dtype=torch.int64)], 1)
    plain = Embedder(built.model.model, how)
    with pytest.raises(dartfx.UnsupportedGraphError, match="kept_positions"):
        compiled(plain)(**inputs)
    torch.compiler.reset()
    model = compiled(plain, on_unsupported="warn")
    for _ in range(2):
        with pytest.warns(dartfx.PruningWarning, match="positions in the prompt"):
            pooled = model(**inputs)
        torch.testing.assert_close(pooled, plain(**inputs), **CLOSE)


@torch.no_grad()
def test_the_last_token_may_be_pooled_behind_a_graph_break() -> None:
    built = family("llava_next")
    inputs = built.make_inputs()
    pooled = compiled(Embedder(built.model.model, "the last"))(**inputs)
    logits = hooked.pruned_forward(built.model, inputs, retain=RETAIN).logits[:, -1]
    torch.testing.assert_close(built.model.lm_head(pooled), logits, **CLOSE)


USES = {
    "place": (lambda h, i: h[:, 3], True),
    "places": (lambda h, i: h[:, i], True),
    "rows": (lambda h, i: h.flatten(0, 1)[i], True),
    "gather": (lambda h, i: torch.gather(h, 1, i[None, :, None]), True),
    "select": (lambda h, i: h.index_select(1, i), True),
    "first and last": (lambda h, i: h[:, 0] + h[:, -1], False),
    "tail": (lambda h, i: h[:, -2:], False),
    "head": (lambda h, i: h[:, :3], True),
    "span": (lambda h, i: h[:, 2:-1], True),
    "from another length": (lambda h, i: h[:, i.shape[0] :], True),
    "all but one": (lambda h, i: h[:, 1:] + h[:, :-1], False),
    "its own length": (lambda h, i: h[:, : h.shape[1]], False),
    "of itself": (lambda h, i: h[:, h.argmax(1)[0]], False),
    "batch": (lambda h, i: h[i], False),
    "mask": (lambda h, i: h[h[..., 0] > 0], False),
}


@pytest.mark.parametrize("use", USES)
def test_which_indices_are_positions(use: str) -> None:
    function, found = USES[use]
    seen: list[dict[int, str]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(uses_of_positions(module.graph))
        return module.forward

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = torch.compile(function, backend=backend, dynamic=True)
        call(torch.randn(2, 5, 4), torch.tensor([0, 1]))
    assert bool(seen[0]) is found
