"""``dartfx.vision_tokens(mask)`` with rows repeated by ``generate``, in threads, and mismatched."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

pytestmark = pytest.mark.shares_compiled

GREEDY: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@functools.cache
def llava() -> Family:
    return load("llava", layers=3)


@functools.cache
def merged() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, S, D] that the caller merged, their attention mask and vision mask."""
    inputs, model = llava().make_inputs("pad2"), llava().model
    vision = inputs["input_ids"] == llava().image_token_id
    seen: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0], inputs["attention_mask"], vision


@functools.cache
def compiled() -> Any:
    model = copy.deepcopy(llava().model)
    return dartfx.compile(
        model, retain_tokens=RETAIN, lowering="eager", on_unsupported="error", kv_layout="uniform"
    )


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 4, "num_return_sequences": 2}, *slow({"num_beams": 2})],
    ids=["returned", "beams"],
)
def test_rows_that_generate_repeats(how: dict[str, int]) -> None:
    embeds, attention, vision = merged()
    rows = {
        name: value.repeat_interleave(how["num_beams"], 0)
        for name, value in llava().make_inputs("pad2").items()
        if name != "pixel_values"
    }
    hooks = hooks_of.Hooks(llava().model, rows, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "uniform"):
        oracle = llava().model.generate(
            inputs_embeds=embeds, attention_mask=attention, **GREEDY, **how
        )
    with dartfx.vision_tokens(vision):
        ours = compiled().generate(inputs_embeds=embeds, attention_mask=attention, **GREEDY, **how)
    assert ours.sequences.tolist() == oracle.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(oracle.logits), **CLOSE)


def test_a_mask_that_was_given_in_another_thread_is_named() -> None:
    embeds, attention, vision = merged()
    model = compiled()

    def call() -> Any:
        return model(inputs_embeds=embeds, attention_mask=attention).logits.shape

    def call_with_mask() -> Any:
        with dartfx.vision_tokens(vision):
            return call()

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        refused = pytest.raises(dartfx.UnsupportedGraphError, match="entered in another thread")
        with dartfx.vision_tokens(vision), refused:
            pool.submit(call).result()
        assert pool.submit(call_with_mask).result()[1] == vision.shape[1] - 16 + RETAIN


def test_a_mask_that_does_not_fit_is_named() -> None:
    embeds, attention, vision = merged()
    refused = pytest.raises(dartfx.UnsupportedGraphError, match=r"was given one of shape \[2, ")
    with dartfx.vision_tokens(vision[:, 1:]), torch.no_grad(), refused:
        compiled()(inputs_embeds=embeds, attention_mask=attention)
