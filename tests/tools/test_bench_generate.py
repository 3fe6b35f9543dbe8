"""``python -m dartfx bench generate``: its figures add up, its rows are what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from dartfx.cli.main import main
from dartfx.tools.bench.generate import arguments as arguments_of
from dartfx.tools.bench.generate import command as generate
from dartfx.tools.bench.generate import variants
from dartfx.tools.bench.generate.gate import Gate
from dartfx.tools.bench.generate.variants import USUAL, VARIANTS, Settings
from dartfx.tools.bench.generate.workload import Workload
from dartfx.tools.zoo.hooked import pruned_generate
from dartfx.tools.zoo.shapes import build

N, R, LAYERS, CUT = 144, 16, 4, 2
NEW = 2  # one decode graph; from the third token on there is another one, of symbolic length
S = 35 + N + 19
BYTES = 2 * 2 * 16 * 4  # keys and values of two heads of 16 channels, float32
TINY = ["bench", "generate", "--model-shape", "tiny", "--device", "cpu", "--lowering", "eager"]
FEW = ["--new-tokens", str(NEW), "--repeat", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def work() -> Workload:
    return build("tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What the command writes and prints."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: printed.extend(map(str, parts)))
        assert main([*TINY, *FEW, "--json", str(file)]) == 0
    return json.loads(file.read_text()), "\n".join(printed)


@pytest.mark.slow
def test_caches_hold_what_the_cut_leaves(measured: tuple[dict[str, Any], str]) -> None:
    rows = {row["name"]: row for row in measured[0]["rows"]}
    assert {name: row["failed"] for name, row in rows.items()} == dict.fromkeys(USUAL, "")
    full, left = LAYERS * S * BYTES, (CUT * S + (LAYERS - CUT) * (S - N + R)) * BYTES
    uniform = LAYERS * (S - N + R) * BYTES
    slots = S + NEW - 1  # the last token is never put into a cache
    short = -(-(slots - N + R) // 8) * 8  # what is left, rounded up by at most an eighth
    assert {name: row["kv_bytes"] for name, row in rows.items()} == {
        "eager": full,
        "hooks": left,
        "plain": full,
        "dart": uniform,
        "plain_static": LAYERS * slots * BYTES,
        "dart_static": LAYERS * short * BYTES,
    }
    assert rows["plain"]["note"] == rows["plain_static"]["note"] == "one graph"


@pytest.mark.slow
def test_figures_follow_from_the_samples(measured: tuple[dict[str, Any], str]) -> None:
    result = measured[0]
    assert result["settings"]["new_tokens"] == [1, NEW]
    assert (result["model"]["vision_tokens"], result["model"]["retained"]) == (N, R)
    assert len(result["vision_tower_samples"]) == 2
    rows = {row["name"]: row for row in result["rows"]}
    for row in result["rows"]:
        for n, samples in row["samples"].items():
            assert len(samples) == 2
            assert row["seconds"][n] == pytest.approx(sum(samples) / 2)
            assert sum(row["shares"][n].values()) == pytest.approx(1)
        assert row["shares"]["1"]["decode"] == 0
        assert row["first_token_seconds"] == row["seconds"]["1"]
        assert row["prompts_per_second"] == pytest.approx(1 / row["seconds"]["1"])
        assert row["warmup_seconds"] > 0
        assert row["peak_bytes"] is None
    first = {row["name"]: row["first_token_seconds"] for row in result["rows"]}
    assert result["speed_ups"].keys() == rows.keys() - {"plain"}
    assert result["speed_ups"]["dart"]["total"]["1"] == pytest.approx(
        first["plain"] / first["dart"]
    )
    # Half of the layers come before the cut.
    assert result["limits"]["unpruned"]["prefill"] == pytest.approx(LAYERS / CUT)
    assert 1 < result["limits"]["flops"]["prefill"] < LAYERS / CUT


@pytest.mark.slow
def test_the_table_shows_what_the_file_holds(measured: tuple[dict[str, Any], str]) -> None:
    result, printed = measured
    for row in result["rows"]:
        rate = row["decode_tokens_per_second"]
        cells = [
            row["label"],
            f"{row['first_token_seconds'] * 1e3:.1f}",
            "-" if rate is None else f"{rate:.1f}",
            f"{row['seconds'][str(NEW)] * 1e3:.1f}",
            f"{row['prompts_per_second']:.1f}",
            "-",
            f"{row['kv_bytes'] / 1e6:.2f}",
            f"{row['warmup_seconds']:.0f}",
        ]
        assert f"| {' | '.join(cells)} |" in printed
    assert f"{S} tokens, {N} of them vision, {R} retained" in printed


def test_batches_of_prompts_with_several_images(tmp_path: Path) -> None:
    file, batch, images = tmp_path / "figures.json", 3, 2
    shape = ["--batch", str(batch), "--images", str(images), "--new-tokens", "1"]
    rows = ["--rows", "hooks", "plain", "dart", "--repeat", "1", "--warmup", "1"]
    assert main([*TINY, *shape, *rows, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    model, hooks, plain, dart = result["model"], *result["rows"]
    assert (model["batch"], model["prompt_tokens"]) == (batch, S + N)
    assert (model["vision_tokens"], model["retained"]) == (images * N, images * R)
    length = S + N - images * (N - R)
    assert plain["kv_bytes"] == batch * LAYERS * (S + N) * BYTES
    assert dart["kv_bytes"] == batch * LAYERS * length * BYTES  # as all layers of a batch do
    assert hooks["kv_bytes"] == batch * (CUT * (S + N) + (LAYERS - CUT) * length) * BYTES
    assert dart["prompts_per_second"] == pytest.approx(batch / dart["seconds"]["1"])


@pytest.mark.parametrize("name", ["plain_static", "dart_static"])
def test_transformers_compiles_the_decode_steps_of_static_caches(
    name: str, work: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            steps.append(args)
            return graph.forward(*args)

        return run

    def static(*_: Any) -> dict[str, Any]:
        config = CompileConfig(backend=backend, mode=None)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}

    monkeypatch.setattr(variants, "_static", static)
    ready = VARIANTS[name][1](work, Settings(R, CUT, "eager"))
    ready.generate(4)
    steps.clear()
    ready.generate(4)
    assert len(steps) == 3


def test_every_round_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that is stopped leaves what it has measured."""
    file = tmp_path / "figures.json"
    figures = generate._figures

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    def then(*args: Any) -> Any:
        monkeypatch.setattr(generate, "_figures", stopped)
        return figures(*args)

    monkeypatch.setattr(generate, "_figures", then)
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, *FEW, "--rows", "eager", "--json", str(file)])
    [row] = json.loads(file.read_text())["rows"]
    assert len(row["samples"]["1"]) == 1


def test_nobody_is_alone_while_another_compiles(tmp_path: Path) -> None:
    waits, compiles = Gate(tmp_path / "gate"), Gate(tmp_path / "gate")
    with waits:
        with compiles:
            waiting = Thread(target=waits.alone)
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
        waiting.join(30)
        assert not waiting.is_alive()
    with Gate(tmp_path / "gate") as again, Gate(None) as without:
        again.alone()
        without.alone()


def test_hooks_prune_as_the_oracle_does(work: Workload) -> None:
    new = 4
    row = VARIANTS["hooks"][1](work, Settings(R, CUT)).generate(new)
    how: Any = {"retain": R, "layer": CUT, "max_new_tokens": new, "kv_layout": "layered"}
    oracle = pruned_generate(work.model, work.inputs, **how)
    assert row.sequences[:, S:].tolist() == oracle.token_ids.tolist()
    lengths = [layer.keys.shape[2] for layer in row.past_key_values.layers]
    assert lengths == oracle.kv_lengths
    assert lengths == [S + new - 1] * CUT + [S - N + R + new - 1] * (LAYERS - CUT)
    # And the model is left as it was.
    unpruned = VARIANTS["eager"][1](work, Settings(R, CUT)).generate(new).past_key_values
    assert [layer.keys.shape[2] for layer in unpruned.layers] == [S + new - 1] * LAYERS


class Operators(TorchDispatchMode):
    """Counts the operators that run inside the ``with`` block."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_hooks_cost_the_same_however_many_layers_they_prune(work: Workload) -> None:
    """Arguments that the layers share are gathered once: a baseline must not be slow."""
    counts = []
    for layer in (1, LAYERS - 1):
        ready = VARIANTS["hooks"][1](work, Settings(R, layer))
        with Operators() as ran:
            ready.generate(NEW)
        counts.append(ran.count)
    assert counts[0] == counts[1]


def test_rows_that_fail_are_reported_and_give_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(VARIANTS, "plain", ("plain Inductor", broken))
    monkeypatch.delitem(VARIANTS, "plain_static")
    monkeypatch.delitem(VARIANTS, "dart_static")
    file = tmp_path / "figures.json"
    arguments = ["--new-tokens", "1", "--repeat", "1", "--warmup", "1", "--json", str(file)]
    assert main([*TINY, *arguments, "--retain-tokens", str(N)]) == 0
    printed = capsys.readouterr().out
    assert "| plain Inductor | failed | - | - | - |" in printed
    assert "plain Inductor: FAILED: RuntimeError: out of memory" in printed
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["plain"].keys() == {"name", "label", "failed"}
    # All tokens retained: dart has nothing to do, and would only repeat plain's figures.
    assert rows["dart"]["failed"].startswith("RuntimeError: nothing was pruned: ")
    assert rows["eager"]["first_token_seconds"] > 0
    assert result["speed_ups"] == result["limits"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-shape", "huge"], "unknown shape 'huge'; known: llava-1.5-7b, "),
        (["--repeat", "0"], "must be at least 1"),
        (["--batch", "0"], "must be at least 1"),
        (["--new-tokens", "0"], "--new-tokens: must be at least 1"),
        (["--turns", "2", "--new-tokens", "1"], "answers of two tokens or more"),
        (["--turns", "2", "--rows", "eager"], "needs the row plain or dart"),
        (["--plot", "totals.png"], "--plot: matplotlib is missing"),
        (["--image", "nowhere.jpg"], "there is no file 'nowhere.jpg'"),
    ],
)
def test_says_what_is_wrong_before_it_begins(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = arguments_of.find_spec
    monkeypatch.setattr(
        arguments_of, "find_spec", lambda n: None if n == "matplotlib" else found(n)
    )
    assert main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_draws_the_parts_of_every_total(
    measured: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from dartfx.tools.bench.generate.plot import draw

    rows = [
        row | {key: {int(n): v for n, v in row[key].items()} for key in ("seconds", "shares")}
        for row in measured[0]["rows"]
    ]
    draw(measured[0] | {"rows": rows}, tmp_path / "totals.png")
    assert (tmp_path / "totals.png").stat().st_size > 1000
