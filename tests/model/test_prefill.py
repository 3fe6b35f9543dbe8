"""Prefills as recordings and of padded prompts: what a CPU can show of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import dartfx
from dartfx.runtime.prefill.checks import on_host
from dartfx.runtime.prefill.padding import is_plain_prefill
from dartfx.runtime.prefill.recorded import Recorded, Recordings, replaying
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN


class Again:
    """Stands for CUDA graphs: replaying computes into the same outputs again."""

    def here(self) -> torch.device:
        return torch.device("cpu")

    def queue(self) -> object:
        return "the only one"

    def record(self, run: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        outputs = run(*args)

        def replay() -> None:
            for old, new in zip(outputs, run(*args), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)

        return replay, outputs


class Double(nn.Module):
    """A model of one weight, compiled by hand."""

    def __init__(self, body: Callable[[Tensor, Tensor], Sequence[Any]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.recordings = Recordings(self, Again(), limit=2)
        self.recorded = Recorded(body)

    def forward(self, x: Tensor) -> Any:
        with replaying(self.recordings), torch.no_grad():
            return self.recorded(self.weight, x)


def row(value: float, length: int = 3) -> Tensor:
    return torch.full((length, 3), value)


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    model = Double(lambda weight, x: (x * weight, x.shape[0]))
    for time in range(4):
        product, length = model(row(time))
        assert torch.equal(product, row(2.0 * time))
        assert length == 3
        assert model.recordings.made == (time > 0)


def test_outputs_outlive_the_next_replay_and_share_memory_as_before() -> None:
    def body(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = x * weight
        return whole, whole[1:].t()

    model = Double(body)
    whole, part = [model(row(time)) for time in range(3)][1]
    assert torch.equal(whole, row(2.0))
    assert part.stride() == (1, 3)
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_parameters_are_read_where_they_are() -> None:
    model = Double(lambda weight, x: (x * weight, weight))
    for _ in range(2):
        model(row(1))
    model.weight.fill_(5.0)
    product, weight = model(row(1))
    assert torch.equal(product, row(5.0))
    assert weight.data_ptr() == model.weight.data_ptr()
    model.weight = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)
    assert torch.equal(model(row(1))[0], row(7.0)), "of other parameters"


def test_the_oldest_shape_goes_first() -> None:
    model = Double(lambda weight, x: (x * weight,))
    for length in (3, 3, 4, 4, 5, 5, 3):
        assert torch.equal(model(row(1, length))[0], row(2.0, length))
    assert model.recordings.made == 3
    model(row(1, 3))
    assert model.recordings.made == 4


def writes(weight: Tensor, x: Tensor) -> tuple[Tensor]:
    return (x.add_(1) * weight,)


def returns_input(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x * weight, x


def writes_state(weight: Tensor, x: Tensor) -> tuple[Tensor]:
    weight.add_(1).sub_(1)
    return (x * weight,)


@pytest.mark.parametrize("body", [writes, writes_state, returns_input])
def test_what_touches_its_inputs_runs_as_it_is(body: Callable[..., Any]) -> None:
    model = Double(body)
    for _ in range(3):
        x = row(1)
        result = model(x)
        assert torch.equal(result[0], body(model.weight, row(1))[0])
        assert torch.equal(x, row(2 if body is writes else 1))
    assert "one of its inputs" in model.recorded.refused


def test_expanded_inputs_and_gradients() -> None:
    model = Double(lambda weight, x: (x * weight,))
    for time in range(3):
        x = torch.full((1, 3), float(time)).expand(4, 3)
        assert torch.equal(model(x)[0], row(2.0 * time, 4))
    assert model.recordings.made == 1
    with replaying(model.recordings), torch.enable_grad():
        model.recorded(model.weight, torch.ones(1, 3).expand(4, 3).requires_grad_())[0].sum()
    assert model.recordings.made == 1


class Frozen(Again):
    """A recording that took a number of the host for a constant: it never changes."""

    def record(self, run: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        outputs = run(*args)
        return lambda: None, outputs


def test_a_replay_that_ignores_its_inputs_is_found() -> None:
    model = Double(lambda weight, x: (x * weight,))
    model.recordings.recorder = Frozen()
    for time in (1, 1, 2, 3):  # right while the inputs are those that it was recorded with
        assert torch.equal(model(row(time))[0], row(2.0 * time))
    assert "something else" in model.recorded.refused


def test_random_numbers_are_not_replayed() -> None:
    model = Double(lambda weight, x: (x * weight + torch.rand(()),))
    torch.manual_seed(3)
    wanted = [torch.rand(()) + 2 for _ in range(3)]
    torch.manual_seed(3)
    for number in wanted:
        assert torch.equal(model(row(1))[0], torch.full((3, 3), float(number)))
    assert "random" in model.recorded.refused


def test_other_streams_autocast_and_inference_mode() -> None:
    model = Double(lambda weight, x: (x * weight,))
    for _ in range(2):
        model(row(1))
    with torch.inference_mode():
        assert torch.equal(model(row(3))[0], row(6.0))
    calls: list[str] = []
    recording = next(iter(model.recorded._by_shape.values()))
    assert recording is not None
    recording.replay = lambda: calls.append("replay")
    with torch.autocast("cpu"):
        assert torch.equal(model(row(4))[0], row(8.0))
    model.recordings.recorder.queue = lambda: "another"  # type: ignore[method-assign]
    assert torch.equal(model(row(5))[0], row(10.0))
    assert calls == []


def test_what_is_done_on_the_host_is_seen_before() -> None:
    def body(x: Tensor) -> Tensor:
        return x.cpu() + torch.ones(3)

    x = torch.empty(3, device="meta")
    graph = torch.fx.symbolic_trace(body).graph
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, device="meta" if node.op == "placeholder" else "cpu")
    assert "on the host" in on_host(graph)
    for node in graph.nodes:
        node.meta["val"] = x
    assert on_host(graph) == ""


def test_a_slice_of_a_buffer_is_known_by_its_length() -> None:
    model = Double(lambda weight, x: (x.sum(0, keepdim=True) * weight,))
    model.register_buffer("table", torch.arange(12.0).view(4, 3))
    for length in (4, 4, 4, 2, 2, 2, 4):
        table = model.table[:length]
        assert torch.equal(model(table)[0], table.sum(0, keepdim=True) * model.weight)


# --- whole models ----------------------------------------------------------------------------


@cache
def family(name: str) -> Family:
    return load(name, layers=3)


def compiled(name: str, **options: Any) -> Any:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    model = dartfx.compile(copy.deepcopy(family(name).model), **settings)
    if (prefills := model._compiled_call_impl.prefills) is not None:
        prefills.recordings.recorder = Again()
    return model


def answer(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


def assert_alike(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(torch.cat(one.logits), torch.cat(other.logits), **CLOSE)
    for mine, theirs in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, **CLOSE)
        torch.testing.assert_close(mine.values, theirs.values, **CLOSE)
        assert mine.dropped == theirs.dropped
        assert torch.equal(mine.kept.keep_idx, theirs.kept.keep_idx)
        assert mine.keys.is_contiguous()


def made_by(model: Any) -> int:
    return int(model._compiled_call_impl.prefills.recordings.made)


@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl", "llava_next")])
def test_padded_and_recorded_prefills_answer_as_plain_ones(name: str) -> None:
    plain, padded = (compiled(name, prefill=prefill) for prefill in (None, "bucketed"))
    for after in (4, 5):
        inputs = family(name).make_inputs("one", after=after)
        assert_alike(answer(plain, inputs), answer(padded, inputs))
    assert made_by(padded), "one length for both"


@pytest.mark.slow
def test_prefills_recorded_at_their_length_answer_as_plain_ones() -> None:
    plain, graphs = (compiled("llava", prefill=prefill) for prefill in (None, "graphs"))
    for after, made in ((4, False), (5, False), (4, True)):
        inputs = family("llava").make_inputs("one", after=after)
        assert_alike(answer(plain, inputs), answer(graphs, inputs))
        assert (made_by(graphs) > 0) == made


@pytest.mark.slow
def test_a_conversation_goes_on_from_a_padded_prompt() -> None:
    inputs = family("llava").make_inputs("one")
    answers = []
    for prefill in (None, "bucketed"):
        model = compiled("llava", prefill=prefill)
        first = answer(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append(answer(model, again, past_key_values=first.past_key_values))
    assert_alike(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two", "pad4"])
def test_batches_keep_their_length(variant: str) -> None:
    inputs = family("llava").make_inputs(variant)
    assert_alike(*(answer(compiled("llava", prefill=p), inputs) for p in (None, "bucketed")))


def test_what_padding_does_not_know_keeps_its_length() -> None:
    cache = DynamicCache()
    ids = torch.ones(1, 9, dtype=torch.int64)
    plain = {"input_ids": ids, "position_ids": ids, "logits_to_keep": 1, "past_key_values": cache}
    assert is_plain_prefill(plain, [cache])
    assert not is_plain_prefill(plain, []), "a cache of the model's own kind"
    assert not is_plain_prefill(plain, [cache, DynamicCache()])
    assert not is_plain_prefill(plain | {"position_ids": None}, [cache])
    assert not is_plain_prefill(plain | {"logits_to_keep": 0}, [cache])
    assert not is_plain_prefill(plain | {"spans": ids}, [cache])
    assert not is_plain_prefill(plain | {"output_hidden_states": True}, [cache])
    assert not is_plain_prefill(plain | {"input_ids": ids.expand(2, -1)}, [cache])
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert not is_plain_prefill(plain, [cache]), "text came before"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prefill": "padded"}, "it can be"),
        ({"prefill": "graphs", "quota": "image"}, "quota"),
        ({"prefill": "graphs", "lowering": "inductor", "mode": "reduce-overhead"}, "mode"),
        ({"prefill": "bucketed", "kv_layout": "layered"}, "kv_layout"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], what: str) -> None:
    with pytest.raises(dartfx.ConfigError, match=what):
        compiled("llava", **options)
