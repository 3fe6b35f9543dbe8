"""``repro.py``: the script alone reproduces the outcome of its graph."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dartfx
from dartfx.passes.outcome import Outcome, Pruned
from dartfx.passes.refusal import Declined
from dartfx.tools.zoo.registry import load
from tests.support.plain.decoders import Decoder, Halves, Sizes, Style, changed, prompt, run


def untimed(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds={}) if isinstance(outcome, Pruned) else outcome


def folders(directory: Path) -> list[Path]:
    return sorted(directory.glob("graph_*"))


def replayed(folder: Path, *arguments: str) -> list[Outcome]:
    """What the script of one dumped graph finds, with no model in reach."""
    reports = runpy.run_path(str(folder / "repro.py"))["main"](list(arguments))
    return [untimed(r.outcome) for r in reports]


def reported() -> list[Outcome]:
    return [untimed(r.outcome) for r in dartfx.reports()]


def unnamed(text: str) -> str:
    """Without the numbers of symbols, which dynamo makes from where a size or float came from."""
    return re.sub(r"\b(s|zf)\d+", r"\1", text)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_script_prunes_as_the_model_was(tmp_path: Path, dynamic: bool) -> None:
    z = Sizes(seq=24, vision=12)
    _, outcome = run(
        Decoder(style=Style(rope="one_row")), prompt(z), dynamic=dynamic, retain_tokens=5, layer=1,
        dump=tmp_path / "first",
    )  # fmt: skip
    assert isinstance(outcome, Pruned)
    (folder,) = folders(tmp_path / "first")
    text = (folder / "repro.py").read_text()
    assert ("replay.size(24)" in text) is dynamic
    again = replayed(folder, "--dump", str(tmp_path / "second"))
    assert unnamed(repr(again)) == unnamed(repr(reported()))
    # The dump of the replay is the dump of the model: the same nodes, shapes and source lines.
    for name in ("01_normalise.txt", "08_check.txt"):
        first, second = (
            f.joinpath(name).read_text() for f in (folder, *folders(tmp_path / "second"))
        )
        assert unnamed(first) == unnamed(second)


def test_the_script_finds_a_refusal_again(tmp_path: Path) -> None:
    layer = changed(lambda m, x: x.cumsum(1))
    _, outcome = run(Decoder(layer=layer), prompt(Sizes()), retain_tokens=5, dump=tmp_path)
    assert isinstance(outcome, Declined)
    assert outcome.where
    assert replayed(folders(tmp_path)[0]) == [outcome]


def test_the_graph_of_a_padded_batch_is_the_one_that_was_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the caller does with the decode mask changes the graph, so the script repeats it."""
    z = Sizes(seq=24, vision=12, batch=2)
    model = dartfx.compile(Decoder(z), retain_tokens=5, lowering="eager", dump=tmp_path / "first")
    with torch.no_grad():
        model(**prompt(z, (0, 3)))
    (folder,) = folders(tmp_path / "first")
    replayed(folder, "--dump", str(tmp_path / "second"))
    files = [f / "08_check.txt" for f in (folder, *folders(tmp_path / "second"))]
    first, second = (unnamed(f.read_text()) for f in files)
    assert first == second
    assert "pruned outputs: " in capsys.readouterr().out


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    run(Decoder(), prompt(Sizes()), retain_tokens=5, dump=tmp_path)
    script = folders(tmp_path)[0] / "repro.py"
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report, ran = done.stdout.split("inputs: 1 as recorded, ")
    assert report == f"{dartfx.reports()[0]}\n"
    assert "\npruned outputs: " in ran


def test_a_mask_that_came_from_an_earlier_graph(tmp_path: Path) -> None:
    options = {"lowering": "eager", "retain_tokens": 5, "dump": tmp_path}
    with torch.no_grad():
        torch.compile(Halves(), backend="dart", options=options)(**prompt(Sizes()))
    kinds = [type(o).__name__ for o in reported()]
    assert kinds == ["ReturnsMask", "Pruned"]
    found = [replayed(folder)[0] for folder in folders(tmp_path)]
    assert found == reported()


def test_a_mask_that_the_caller_gave(tmp_path: Path) -> None:
    model = Decoder()
    inputs = prompt(Sizes())
    with torch.no_grad():
        embeds, mask = model.merge(**inputs)

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> Any:
            context, outputs = self.inner.context(x, None), []
            for layer in self.inner.layers:
                x, k, v = layer(x, context)
                outputs += [k, v]
            return self.inner.finish(x, outputs, [])

    options = {"lowering": "eager", "retain_tokens": 5, "dump": tmp_path}
    with torch.no_grad(), dartfx.vision_tokens(mask):
        torch.compile(Layers(), backend="dart", options=options)(embeds)
    assert isinstance(reported()[-1], Pruned)
    assert replayed(folders(tmp_path)[-1])[-1] == reported()[-1]


@pytest.mark.parametrize("name", ["gemma3"])
def test_graphs_of_whole_models(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks made under vmap, experts, and what else transformers writes into a graph."""
    family = load(name, layers=3)
    model = dartfx.compile(family.model, retain_tokens=6, lowering="eager", dump=tmp_path)
    model.generate(**family.make_inputs(), max_new_tokens=1, do_sample=False)
    expected = [o for o in reported() if isinstance(o, Pruned)]
    assert expected
    found = [o for folder in folders(tmp_path) for o in replayed(folder)]
    assert [o for o in found if isinstance(o, Pruned)] == expected
    ran = capsys.readouterr().out
    assert ran.count("\npruned outputs: ") == len(expected)
    assert "NOT" not in ran


def test_what_cannot_be_written_down_says_so_when_run(tmp_path: Path) -> None:
    from dartfx.observe.repro_script import script

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = object()
    graph.output(graph.call_function(lambda x: x, (x,)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    (tmp_path / "repro.py").write_text(script(dartfx.DartConfig(), module, {}))
    with pytest.raises(NotImplementedError, match=r"could not record object .*attach the model"):
        replayed(tmp_path)
