"""A repro's graph runs on random inputs, pruned and unpruned, or says why it cannot."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dartfx.observe import trial
from dartfx.observe.random_inputs import RandomInputs
from dartfx.passes.frontend.normalise import normalise
from dartfx.passes.outcome import Pruned
from tests.support.decoders import IMAGE, Decoder, Halves, Sizes, Style, changed, prompt, run

LENGTH, VISION, KEPT = 24, 12, 5


def told(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that the script of a dumped graph prints after the report."""
    capsys.readouterr()
    runpy.run_path(str(folder / "repro.py"))["main"](list(arguments))
    return [x for x in capsys.readouterr().out.splitlines() if not x.startswith(("graph", " "))]


def shapes(line: str) -> list[list[int]]:
    """Every output's shape, as often as it is there."""
    found = []
    for count, shape in re.findall(r"(?:(\d+) x )?float32 \[([\d, ]*)\]", line):
        found += [[int(n) for n in shape.split(", ")]] * int(count or 1)
    return sorted(found)


def drawn(model: nn.Module, inputs: dict[str, Any], **more: Any) -> tuple[RandomInputs, list[Any]]:
    """Random inputs of the graph that dynamo makes of a call, and its own examples."""
    seen: list[Any] = []

    def backend(module: torch.fx.GraphModule, examples: list[Any]) -> Any:
        values = [n.meta["example_value"] for n in module.graph.nodes if n.op == "placeholder"]
        seen.append((RandomInputs(normalise(module), values), values))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **more)(**inputs)
    ((found, values),) = seen
    return found, values


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_both_run_and_show_their_shapes(
    tmp_path: Path, batch: int, dynamic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    z = Sizes(seq=LENGTH, vision=VISION, batch=batch)
    model, pads = Decoder(z, Style(mask="4d_float")), tuple(range(batch))
    wanted, outcome = run(
        model, prompt(z, pads), dynamic=dynamic, retain_tokens=KEPT, dump=tmp_path
    )
    assert isinstance(outcome, Pruned)
    first, mask, unpruned, pruned = told(tmp_path / "graph_000", capsys)
    assert first.startswith("random inputs (seed 0): ")
    assert re.fullmatch(rf"mask \w+: {batch * VISION} positions for {batch * VISION} rows", mask)
    assert shapes(pruned) == sorted(list(t.shape) for t in wanted)
    assert shapes(unpruned) == sorted(list(t.shape) for t in model(**prompt(z, pads)))
    assert "NOT" not in unpruned + pruned


def test_with_a_mask_from_an_earlier_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z = Sizes(seq=LENGTH, vision=VISION, batch=2)
    options = {"lowering": "eager", "retain_tokens": KEPT, "dump": tmp_path}
    with torch.no_grad():
        wanted = torch.compile(Halves(z), backend="dart", options=options)(**prompt(z))
    *_, unpruned, pruned = told(tmp_path / "graph_001", capsys)
    assert shapes(pruned) == sorted(list(t.shape) for t in wanted)
    assert shapes(pruned) != shapes(unpruned)


def test_a_refused_graph_runs_unpruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Decoder(layer=changed(lambda m, x: x.cumsum(1))), prompt(Sizes()), dump=tmp_path)
    *_, last = told(tmp_path / "graph_000", capsys)
    assert last.startswith("unpruned, it runs: ")


class Above(Decoder):
    """Vision tokens are all ids above a number, which random ids do not know."""

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids < IMAGE + 1
        return self.embed(ids).masked_scatter(vision.unsqueeze(-1), features), vision


def test_a_mask_that_does_not_fit_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Above(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    first, mask = told(tmp_path / "graph_000", capsys)
    assert re.match(
        r"no values were found that this graph accepts: x \(.*\) says: Number of", first
    )
    assert re.search(r": 24 positions for 12 rows: these values do NOT fit", mask)


class Split(nn.Module):
    """Splits by numbers in a tensor, which must add up."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first, second = lengths.tolist()
        torch._check(first + second == 9)
        return x.split([first, second])[0].sum()


def test_values_that_cannot_be_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"x": torch.ones(9), "lengths": torch.tensor([4, 5])}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run(Split(), inputs, dump=tmp_path)
        (last,) = told(tmp_path / "graph_000", capsys)
    assert re.match(r"no values were found that this graph accepts: \w+ \(.*\) says: Runtime", last)


def test_what_is_too_large_is_not_run_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    folder = tmp_path / "graph_000"
    monkeypatch.setattr(trial, "_memory", lambda: 100)
    (last,) = told(folder, capsys)
    assert last.startswith("not run: its inputs take 0.0 GB, more than half")
    assert told(folder, capsys, "--run")[-1].startswith("pruned, it runs:")
    assert told(folder, capsys, "--no-run") == []


def test_what_only_the_pruned_graph_refuses_is_raised(tmp_path: Path) -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    replay: dict[str, Any] = {}

    class Kept(trial.Trial):
        def lines(self, compiled: Any, *rest: Any) -> Any:
            replay["again"] = lambda broken: list(super(Kept, self).lines(broken, *rest))
            return super().lines(compiled, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dartfx.observe.replay.Trial", Kept)
        runpy.run_path(str(tmp_path / "graph_000" / "repro.py"))["main"]([])

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug behind the cut")

    with pytest.raises(RuntimeError, match="a bug behind the cut"):
        replay["again"](broken)


def test_a_graph_of_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine that lacks a device")
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    script = tmp_path / "graph_000" / "repro.py"
    script.write_text(script.read_text().replace("'cpu'", "'cuda:0'"))
    lines = told(script.parent, capsys)
    assert lines[0] == "no cuda here: on the CPU instead"
    assert lines[-1].startswith("pruned, it runs:")


class Reads(nn.Module):
    """Every kind of integer input, and floats in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.BatchNorm1d(4).eval()
        self.register_buffer("turns", torch.arange(6)[None])

    def forward(
        self,
        ids: Tensor,
        valid: Tensor,
        places: Tensor,
        table: Tensor,
        labels: Tensor,
        scale: float,
    ) -> Tensor:
        x = self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2) * scale
        x = x + table[places[0]] + table.index_select(0, self.turns[0])
        x = x.masked_fill(~valid.bool()[..., None], 0.0)
        return nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())


def test_values_are_in_the_range_of_what_reads_them() -> None:
    model = Reads()
    inputs = {
        "ids": torch.zeros(2, 6, dtype=torch.int64),
        "valid": torch.ones(2, 6, dtype=torch.int32),
        "places": torch.zeros(1, 6, dtype=torch.int64),
        "table": torch.zeros(4, 6).t(),
        "labels": torch.zeros(2, 6, dtype=torch.int64),
        "scale": 0.5,
    }
    found, _ = drawn(model, inputs, dynamic=False)
    many = [found.draw(seed) for seed in range(20)]
    by_shape = [
        {(*v.shape, v.dtype): v for v in values if isinstance(v, Tensor)} for values in many
    ]
    for values in by_shape:
        assert values[2, 6, torch.int32].eq(1).all(), "valid"
        assert values[1, 6, torch.int64].tolist() == [list(range(6))], "places, or the buffer"
        table = values[6, 4, torch.float32]
        assert table.stride() == (1, 6)
        assert table.unique().numel() == 24
        assert values[7, 4, torch.float32].std() < 1, "weights"
    integers = [v for vs in many for v in vs if isinstance(v, Tensor) and v.shape == (2, 6)]
    ids = torch.stack([v for v in integers if v.dtype == torch.int64])
    assert (int(ids.min()), int(ids.max())) == (0, 6)
    assert ids[::2].max() != ids[1::2].max(), "ids are below 7, labels below 4"
    assert same(many[1], found.draw(1))
    assert not same(many[1], many[0])


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_marks_are_as_many_as_rows_and_never_by_accident() -> None:
    z = Sizes(batch=2)
    found, _ = drawn(Decoder(z), prompt(z), dynamic=False)
    for seed in range(10):
        values = found.draw(seed)
        ((demand, marked),) = found.met(values)
        assert marked == demand.rows == 2 * z.vision
        (ids,) = (v for v in values if isinstance(v, Tensor) and v.shape == (2, z.seq))
        assert (ids == IMAGE).sum(1).tolist() == [z.vision, z.vision]


class Overlapping(nn.Module):
    """Reads an expanded input and an integer without dims, as a cache's own length is."""

    def forward(self, x: Tensor, mask: Tensor, length: Tensor) -> Tensor:
        return x.masked_fill(~mask, 0.0) + length


def test_expanded_inputs_keep_their_strides_and_numbers_are_known_or_zero() -> None:
    inputs = {
        "x": torch.zeros(1, 3).expand(4, 3),
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "length": torch.tensor(3),
    }
    found, examples = drawn(Overlapping(), inputs, dynamic=False)
    x, mask, length = found.draw()
    assert x.stride() == (0, 1)
    assert torch.equal(x[0], x[3])
    assert mask.all()
    assert length == 3, "dynamo knew it"
    with FakeTensorMode():
        unknown = torch.empty((), dtype=torch.int64)
    again = RandomInputs(found._module, [*examples[:2], unknown])
    assert [int(again.draw(unknown=u)[2]) for u in ("count", "one", "zero")] == [0, 1, 0]


class Given(nn.Module):
    """A merge whose mask [B, S, D] is an input, as after a graph break."""

    def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return x.masked_scatter(mask, features)


@pytest.mark.parametrize("width", [1, 4])
def test_a_mask_with_the_features_dim_marks_whole_positions(width: int) -> None:
    mask = torch.zeros(2, 9, width, dtype=torch.bool)
    inputs = {"x": torch.zeros(2, 9, 4), "mask": mask, "features": torch.zeros(6, 4)}
    found, _ = drawn(Given(), inputs, dynamic=False)
    values = found.draw()
    ((demand, marked),) = found.met(values)
    assert marked == demand.rows == 6
    (mask,) = (v for v in values if v.dtype == torch.bool)
    assert mask.sum(1).tolist() == [[3] * width] * 2
