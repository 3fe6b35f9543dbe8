"""A repro's graph runs, pruned and unpruned, on the call's integers and random floats."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dartfx.observe import repro_inputs
from dartfx.passes.outcome import Pruned
from dartfx.replay import run as repro_run
from tests.support.plain.decoders import IMAGE, Decoder, Halves, Sizes, Style, changed, prompt, run

LENGTH, VISION, KEPT = 24, 12, 5


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
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


def dynamo_graph(
    model: nn.Module, inputs: dict[str, Any], **more: Any
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """What dynamo gives to a backend for a call: the graph and its inputs."""
    seen: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(module: torch.fx.GraphModule, examples: list[Any]) -> Any:
        seen.append((module, examples))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, **more)(**inputs)
    return seen[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_both_run_and_show_their_shapes(
    tmp_path: Path, batch: int, dynamic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    z = Sizes(seq=LENGTH, vision=VISION, batch=batch)
    model, pads = Decoder(z, Style(mask="4d_float")), tuple(range(batch))
    inputs = prompt(z, pads)
    wanted, outcome = run(model, inputs, dynamic=dynamic, retain_tokens=KEPT, dump=tmp_path)
    assert isinstance(outcome, Pruned)
    saved = repro_inputs.load(tmp_path / "graph_000")
    assert [t.dtype for t in saved.values()] == [torch.int64, torch.bool]
    assert all(map(torch.equal, saved.values(), (inputs["ids"], inputs["valid"])))
    first, unpruned, pruned = printed(tmp_path / "graph_000", capsys)
    assert re.match(r"inputs: 2 as recorded, \d+ random \(seed 0\), ", first)
    assert shapes(pruned) == sorted(list(t.shape) for t in wanted)
    assert shapes(unpruned) == sorted(list(t.shape) for t in model(**inputs))
    assert "NOT" not in unpruned + pruned


def test_with_a_mask_from_an_earlier_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    z = Sizes(seq=LENGTH, vision=VISION, batch=2)
    options = {"lowering": "eager", "retain_tokens": KEPT, "dump": tmp_path}
    with torch.no_grad():
        wanted = torch.compile(Halves(z), backend="dart", options=options)(**prompt(z))
    *_, unpruned, pruned = printed(tmp_path / "graph_001", capsys)
    assert shapes(pruned) == sorted(list(t.shape) for t in wanted)
    assert shapes(pruned) != shapes(unpruned)


def test_a_refused_graph_runs_unpruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Decoder(layer=changed(lambda m, x: x.cumsum(1))), prompt(Sizes()), dump=tmp_path)
    *_, last = printed(tmp_path / "graph_000", capsys)
    assert last.startswith("unpruned outputs: ")


class Below(Decoder):
    """Vision tokens are all ids below a number: nothing that random ids would satisfy."""

    def merge(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        vision = ids < IMAGE + 1
        return self.embed(ids).masked_scatter(vision.unsqueeze(-1), features), vision


def test_masks_fit_the_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Below(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    assert printed(tmp_path / "graph_000", capsys)[-1].startswith("pruned outputs: ")


class Split(nn.Module):
    """Splits by numbers in a tensor, which must add up; ``scale`` must be large."""

    def forward(self, x: Tensor, lengths: Tensor, scale: Tensor) -> Tensor:
        first, second = lengths.tolist()
        torch._check(first + second == 9)
        torch._assert_async((scale >= 100).all())
        return x.split([first, second])[0].sum()


def test_numbers_that_must_add_up_and_floats_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths, scale = torch.tensor([4, 5]), torch.full((3,), 100.0)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run(Split(), {"x": torch.ones(9), "lengths": lengths, "scale": scale}, dump=tmp_path)
        *_, last = printed(tmp_path / "graph_000", capsys)
    assert re.match(r"unpruned, it fails on random floats: _assert_async \(.*\): Expected", last)


def test_without_the_recorded_inputs_only_the_passes_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    folder = tmp_path / "graph_000"
    (folder / "inputs.pt").unlink()
    (last,) = printed(folder, capsys)
    assert last.startswith("not run: inputs.pt, next to this script, does not hold the graph's")
    assert "l_ids_" in last


def test_what_is_too_large_is_run_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    folder = tmp_path / "graph_000"
    monkeypatch.setattr(repro_run, "_memory", lambda: 100)
    (last,) = printed(folder, capsys)
    assert last.startswith("not run: its inputs take 0.0 GB, more than half")
    assert printed(folder, capsys, "--run")[-1].startswith("pruned outputs: ")
    assert printed(folder, capsys, "--no-run") == []


def test_what_only_the_pruned_graph_refuses_is_raised() -> None:
    inputs = prompt(Sizes())
    module, _ = dynamo_graph(Decoder(), inputs)

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug behind the cut")

    lines = repro_run.run_both(module, broken, {"l_ids_": inputs["ids"]}, None, seed=0)
    assert next(lines).startswith("inputs: 1 as recorded")
    assert next(lines).startswith("unpruned outputs: ")
    with pytest.raises(RuntimeError, match="a bug behind the cut"):
        next(lines)


def test_a_graph_of_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine that lacks a device")
    run(Decoder(), prompt(Sizes()), retain_tokens=KEPT, dump=tmp_path)
    script = tmp_path / "graph_000" / "repro.py"
    script.write_text(script.read_text().replace("'cpu'", "'cuda:0'"))
    lines = printed(script.parent, capsys)
    assert lines[0] == "no cuda here: using the CPU"
    assert lines[-1].startswith("pruned outputs: ")


class Reads(nn.Module):
    """Integers as input, as a small buffer and as a large parameter; floats in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).eval()
        self.weight = nn.Parameter(torch.randn(7, 4))
        self.register_buffer("turns", torch.arange(6)[None])
        self.register_buffer("quantised", torch.ones(1 << 11, 1 << 10, dtype=torch.int8))

    def forward(self, ids: Tensor, table: Tensor, expanded: Tensor, scale: float) -> Tensor:
        x = self.norm(self.weight[ids].transpose(1, 2)).transpose(1, 2) * scale
        return x + table.index_select(0, self.turns[0]) + expanded + self.quantised.sum()


def test_integers_are_saved_and_floats_drawn(tmp_path: Path) -> None:
    inputs = {
        "ids": torch.randint(7, (2, 6)),
        "table": torch.zeros(4, 6).t(),
        "expanded": torch.zeros(4).expand(6, 4),
        "scale": 0.5,
    }
    module, examples = dynamo_graph(Reads(), inputs, dynamic=True)
    repro_inputs.save(module, examples, tmp_path)
    saved = repro_inputs.load(tmp_path)
    assert sorted(t.numel() for t in saved.values()) == [6, 12], "weights are not saved"
    assert not any(t.is_floating_point() for t in saved.values())
    assert not repro_inputs.unrecorded(module, saved)
    assert repro_inputs.unrecorded(module, {}) == ["l_ids_"], "buffers can be replaced by zeros"
    draws = [repro_inputs.draw(module, saved, seed) for seed in (0, 1, 1)]
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    values, other, again = (dict(zip(names, v, strict=True)) for v in draws)
    assert torch.equal(values["l_ids_"], inputs["ids"])
    assert values["l_table_"].stride() == (1, 6)
    assert values["l_table_"].unique().numel() == 24
    assert values["l_expanded_"].stride() == (0, 1)
    assert not torch.equal(values["l_table_"], other["l_table_"])
    assert torch.equal(other["l_table_"], again["l_table_"])
    by_shape = {tuple(v.shape): v for v in values.values() if isinstance(v, Tensor)}
    assert by_shape[7, 4].std() < 1, "weights"
    assert by_shape[1, 6].tolist() == [list(range(6))], "the buffer"
    assert not by_shape[1 << 11, 1 << 10].any(), "too large to be saved"
    assert 0.5 in [float(v) for v in values.values() if isinstance(v, Tensor) and not v.ndim]


def test_values_that_are_not_there_are_not_saved(tmp_path: Path) -> None:
    module, _ = dynamo_graph(Decoder(), prompt(Sizes()))
    with FakeTensorMode():
        fake = [
            torch.empty(1, dtype=torch.int64) for _ in module.graph.find_nodes(op="placeholder")
        ]
    repro_inputs.save(module, fake, tmp_path)
    assert not list(tmp_path.iterdir())
