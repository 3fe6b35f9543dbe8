"""Every way to call a compiled model: pruned as by hooks or refused, never silently unpruned."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dartfx
from dartfx.model.arguments import Arguments
from dartfx.model.caches.kv_cache import pruned_length
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

Decode = Callable[[Any, dict[str, Any]], tuple[Tensor, Any]]


@functools.cache
def llava() -> Family:
    return load("llava", layers=3)


def compiled(model: Any = None, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    model = llava().model if model is None else model
    return dartfx.compile(copy.deepcopy(model), **settings)


@functools.cache
def by_hooks() -> Tensor:
    inputs = llava().make_inputs()
    return hooked.pruned_forward(llava().model, inputs, retain=RETAIN).logits


# --- how arguments are passed and what comes back ---------------------------------------------


class Wrapper(nn.Module):
    """A model of the user's own around a transformers model, with names of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], words: Tensor, memory: Any) -> Tensor:
        return self.model(input_ids=words, past_key_values=memory, **batch).logits


def by_name(model: Any, call: dict[str, Any]) -> tuple[Tensor, Any]:
    output = model(**call)
    return output.logits, output.past_key_values


def by_position_as_tuple(model: Any, call: dict[str, Any]) -> tuple[Tensor, Any]:
    logits, cache, *_ = model(call.pop("input_ids"), **call, return_dict=False)
    return logits, cache


def through_wrapper(model: Any, call: dict[str, Any]) -> tuple[Tensor, Any]:
    from transformers import DynamicCache

    cache = call.pop("past_key_values") or DynamicCache()
    return model(call, call.pop("input_ids"), cache), cache


def decoded(model: Any, inputs: dict[str, Any], decode: Decode) -> Tensor:
    """Logits of a prefill and of two decode steps, as a hand-written loop makes them."""
    seen, cache, call = [], None, dict(inputs)
    for step in range(3):
        logits, cache = decode(model, call | {"use_cache": True, "past_key_values": cache})
        seen.append(logits[:, -1])
        mask = torch.cat([call["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        call = {
            "input_ids": torch.tensor([[20 + step], [30 + step]]),
            "attention_mask": mask,
            "position_ids": mask.cumsum(1)[:, -1:] - 1,
        }
    return torch.stack(seen)


@pytest.mark.parametrize("decode", [through_wrapper, *slow(by_position_as_tuple)])
def test_a_ragged_batch_decodes_alike_however_it_is_called(decode: Decode) -> None:
    built, inputs = llava(), llava().make_inputs("ragged")
    hooks = hooks_of.Hooks(built.model, inputs, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "uniform"), torch.no_grad():
        oracle = decoded(built.model, inputs, by_name)
    model = compiled(Wrapper(built.model) if decode is through_wrapper else None)
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, inputs, decode), oracle, **CLOSE)
    assert sum(made.pruned for made in dartfx.reports()) == 1


@pytest.mark.parametrize("return_dict", [True, *slow(False)])
def test_a_static_cache_in_a_plain_call(return_dict: bool) -> None:
    from transformers import StaticCache

    inputs = llava().make_inputs()
    cache = StaticCache(llava().model.config, max_cache_len=64)
    model = compiled()
    with torch.no_grad():
        output = model(**inputs, past_key_values=cache, return_dict=return_dict)
    assert output[1] is cache
    prompt = inputs["input_ids"].shape[1]
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {prompt}
    assert pruned_length(cache) == prompt - by_hooks().shape[1]
    torch.testing.assert_close(output[0], by_hooks(), **CLOSE)


def test_arguments_are_known_by_what_they_are() -> None:
    def forward(ids: Tensor, /, image: Any = None, **more: Any) -> None: ...

    words, pixels = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 3, 4, 4)
    call = Arguments.of(forward, (words, {"pixels": [pixels]}), {"some_mask": torch.ones(1, 7)})
    assert call.kind == {"ids", "image", "some_mask"}
    assert (call.tokens, call.media) == (7, ["image"])
    other = call.with_swaps({id(pixels): None})
    assert other.args[0] is words
    assert other.args[1] == {"pixels": [None]}
    assert call.args[1]["pixels"][0] is pixels


# --- nothing compiled, nothing pruned, never nothing said --------------------------------------


def disabled() -> Any:
    return torch._dynamo.config.patch(disable=True)


STANDS = {
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "another backend": lambda: torch.compiler.set_stance("default", force_backend="eager"),
    "disabled": disabled,
    "a dispatch mode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("stand", STANDS)
def test_a_call_that_torch_does_not_compile_is_refused(stand: str) -> None:
    inputs, model = llava().make_inputs(), compiled()
    with STANDS[stand](), torch.no_grad():
        for _ in range(2):
            with pytest.raises(dartfx.UnsupportedGraphError, match=r"pixel_values|disabled|mode"):
                model(**inputs)
        text = llava().make_inputs("text")
        assert model(**text).logits.shape[1] == text["input_ids"].shape[1]


def test_generate_where_torch_compile_is_disabled() -> None:
    inputs, how = llava().make_inputs(), {"max_new_tokens": 3, "do_sample": False}
    model = compiled(on_unsupported="warn")
    with disabled(), pytest.warns(dartfx.PruningWarning, match="torch.compile is disabled"):
        ids = model.generate(**inputs, **how)
    assert ids.tolist() == llava().model.generate(**inputs, **how).tolist()


def test_more_compilations_than_the_limit_are_refused() -> None:
    """Of one dartfx.compile: calls of another dtype, say, are compiled once more each."""
    model = compiled(dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        model(**llava().make_inputs(before=3), use_cache=False)
        with pytest.raises(dartfx.UnsupportedGraphError, match="recompile_limit"):
            model(**llava().make_inputs(before=5), use_cache=False)
        model(**llava().make_inputs(before=3), use_cache=False)  # compiled already
    assert sum(made.pruned for made in dartfx.reports()) == 1


def test_a_sweep_of_budgets_in_one_process() -> None:
    inputs, model = llava().make_inputs(), copy.deepcopy(llava().model)
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for retain in (1, 3):
            oracle = hooked.pruned_forward(llava().model, inputs, retain=retain).logits
            dartfx.compile(model, retain_tokens=retain, lowering="eager", on_unsupported="error")
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, oracle, **CLOSE)


# --- another torch.compile ---------------------------------------------------------------------


def test_a_torch_compile_around_the_model() -> None:
    inputs = llava().make_inputs()
    outer = torch.compile(compiled(), backend="aot_eager")  # as Trainer(torch_compile=True)
    with torch.no_grad():
        torch.testing.assert_close(outer(**inputs).logits, by_hooks(), **CLOSE)
        text = llava().make_inputs("text")
        torch.testing.assert_close(outer(**text).logits, llava().model(**text).logits, **CLOSE)


def test_a_torch_compile_around_the_model_that_wants_one_graph() -> None:
    outer = torch.compile(compiled(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"):
        outer(**llava().make_inputs())


def test_a_torch_compile_inside_the_model() -> None:
    model, inputs = compiled(), llava().make_inputs()
    decoder = model.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="eager")  # a nested region
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, by_hooks(), **CLOSE)
    model.forward = torch.compile(model.forward, backend="eager")  # dynamo skips the frame around
    for _ in range(2):
        with pytest.raises(dartfx.UnsupportedGraphError, match="given pixel_values"):
            model(**inputs)


# --- threads -----------------------------------------------------------------------------------


def test_threads_that_call_a_freshly_compiled_model_at_once() -> None:
    how = {
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    calls = [llava().make_inputs(seed=seed, before=3 + seed) for seed in range(3)]
    for call in calls:
        del call["attention_mask"]
    expected = [
        hooked.pruned_generate(
            llava().model, call, retain=RETAIN, max_new_tokens=2, kv_layout="uniform"
        ).logits
        for call in calls
    ]
    model = compiled()

    def answer(number: int) -> str:
        made = model.generate(**calls[number % 3], **how)
        off = (torch.stack(made.logits, 1) - expected[number % 3]).abs().max()
        return "right" if off < 1e-3 else "wrong"

    with ThreadPoolExecutor(4) as pool:
        assert Counter(pool.map(answer, range(12))) == {"right": 12}


@pytest.mark.parametrize("order", ["bare first", *slow("given first")])
def test_a_graph_that_ran_pruned_once_is_no_excuse_for_a_call_without_its_mask(order: str) -> None:
    inputs, model = llava().make_inputs(), compiled()
    vision = inputs["input_ids"] == llava().image_token_id
    call = {
        "inputs_embeds": llava().model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }

    def given() -> None:
        with torch.no_grad(), dartfx.vision_tokens(vision):
            assert model(**call).logits.shape[1] < vision.shape[1]

    def bare() -> None:
        with torch.no_grad(), pytest.raises(dartfx.UnsupportedGraphError, match="inputs_embeds"):
            model(**call)

    for call_it in (given, bare) if order == "given first" else (bare, given, bare):
        call_it()
