"""Recordings of compiled code: when they are made, their outputs, what is not recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dartfx.runtime.prefill.checks import on_host
from dartfx.runtime.prefill.recorded import Recorded, Recordings, replaying
from tests.support.replaying import Again


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


@pytest.mark.parametrize("before", [0, 1, 2, 4])
def test_nothing_runs_or_is_recorded_where_a_check_fails(before: int) -> None:
    events: list[str] = []

    def body(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        events.append("runs")
        return (x * weight,)

    def check(weight: Tensor, x: Tensor) -> Callable[[], None]:
        smallest = x.min()

        def require() -> None:
            events.append("checked")
            if smallest < 0:
                raise RuntimeError("negative")

        return require

    model = Double(body)
    model.recorded = Recorded(body, check=check)
    for value in range(before):
        assert torch.equal(model(row(value))[0], row(2.0 * value))
    made, ran = model.recordings.made, events.count("runs")
    with pytest.raises(RuntimeError, match="negative"):
        model(row(-1))
    assert (model.recordings.made, events.count("runs")) == (made, ran)
    assert model.recorded.refused == "", "the inputs' fault, not the code's"
    for value in (3, 4):
        events.clear()
        assert torch.equal(model(row(value))[0], row(2.0 * value))
        assert events[0] == "checked"
    with pytest.raises(RuntimeError, match="negative"), torch.no_grad():
        model.recorded(model.weight, row(-1))


def test_the_inputs_of_a_replay_are_copied_before_the_host_waits_for_its_check() -> None:
    seen: list[float] = []

    def check(weight: Tensor, x: Tensor) -> Callable[[], None]:
        return lambda: seen.extend(
            float(made.buffers[1][0, 0]) for made in model.recorded._by_shape.values() if made
        )

    model = Double(lambda weight, x: (x * weight,))
    model.recorded = Recorded(lambda weight, x: (x * weight,), check=check)
    for value in range(3):
        model(row(value))
    assert seen == [2.0]


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
