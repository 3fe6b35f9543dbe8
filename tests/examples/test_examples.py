"""The programs of ``make demo`` and ``make bench``, run as by a user, at tiny sizes."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.slow import slow

EXAMPLES = Path(__file__).parents[2] / "examples"
N, RETAIN, LAYERS, CUT = 16, 4, 4, 2  # of --tiny
# fp32, keys and values, hidden size 64
BYTES_PER_TOKEN = 4 * 2 * 64
EAGER = ("--lowering", "eager")
ONLY_TIMES = ("--questions", "0")
FEW = ("--max-new-tokens", "2")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The examples import one another by file name; and so small a model needs one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def numbers(pattern: str, text: str) -> list[int]:
    """The integers that the groups of ``pattern`` match, without thousands separators."""
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in:\n{text}"
    return [int(group.replace(",", "")) for group in found.groups()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, saved as one downloads it, and a photograph of noise."""
    from PIL import Image

    folder, vlm = tmp_path_factory.mktemp("model"), load("vlm")
    size = vlm.SIZES["tiny"]
    vlm.build_model(size, seed=3).save_pretrained(folder)
    vlm.build_processor(size).save_pretrained(folder)
    Image.effect_noise((90, 60), 80.0).save(folder / "photo.png")
    return folder


def check_demo(text: str, retain: int) -> None:
    """The demo's figures agree with one another and with the sizes of the tiny model."""
    [prompt] = numbers(r"prompt: (\d+) tokens, vision", text)
    kept = prompt - N + retain
    assert numbers(r"pruned before decoder layer (\d+) of .*language_model", text) == [CUT]
    assert numbers(r"vision tokens: (\d+) per sample .*, (\d+) retained", text) == [N, retain]
    assert numbers(r"tokens from layer 2 on: (\d+) -> (\d+)", text) == [prompt, kept]
    assert numbers(r"tokens in layers 0\.\.1: +(\d+) -> (\d+)", text) == [prompt, kept]
    assert numbers(r"KV cache bytes: ([\d,]+) -> ([\d,]+)", text) == [
        LAYERS * prompt * BYTES_PER_TOKEN,
        LAYERS * kept * BYTES_PER_TOKEN,
    ]
    assert "modeling_llama.py" in text  # the source line of what crosses the cut
    plain, dart = re.findall(r"ids: +\[([\d, ]+)\]", text)
    assert len(plain.split(",")) == len(dart.split(",")) == 2


def check_answers(text: str, count: int, picture: Path) -> None:
    """The first part counts as the measure does, and shows the questions it says it shows."""
    from PIL import Image, ImageStat

    from dartfx.tools.evaluate.questions import load as load_questions

    questions = load_questions(EXAMPLES / "tiny_vlm" / "heldout" / "questions.jsonl")
    assert f"first {count} held-out questions" in text
    [full, of] = numbers(r"all 576 vision tokens +(\d+) of (\d+)", text)
    [few, of_few] = numbers(r"64 of them, by DART +(\d+) of (\d+)", text)
    assert of == of_few == count
    assert count - 1 <= full <= count  # 93% are right in the model card
    shown = re.findall(
        r"(both answer right|pruning got wrong): question (\d+), .*\n +question +(.*)\n"
        r" +answer +(.*)\n +576 tokens +(.*)\n +64 tokens +(.*)\n",
        text,
    )
    assert [each[0] for each in shown] == ["both answer right", "pruning got wrong"]
    for (_, number, question, answer, said, said_of_few), right in zip(
        shown, (True, False), strict=True
    ):
        expected = questions[int(number) - 1]
        assert (question, answer, said) == (expected.text, expected.answer, expected.answer)
        assert (said_of_few == answer) == right
    assert few < full
    # The first that both get right comes after as many as pruning can have got wrong before it.
    assert int(shown[0][1]) <= count - few + 1
    with Image.open(picture) as drawn:
        assert drawn.size == (672 * 2 + 8, 672)
        left, right_half = drawn.crop((0, 0, 672, 672)), drawn.crop((680, 0, 1352, 672))
        dark = [sum(ImageStat.Stat(half).sum) for half in (left, right_half)]
    assert dark[1] < 0.8 * dark[0]  # 512 of 576 patches are dimmed


def test_demo_on_the_trained_model_and_the_sample_photograph(tmp_path: Path) -> None:
    # In a separate process, as in make.
    picture = tmp_path / "kept.png"
    arguments = ["--tiny", *EAGER, *FEW, "--repeat", "2", "--questions", "8", "--out", picture]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    check_answers(text, 8, picture)
    assert "RANDOM weights" in text
    assert "china.jpg 640x427" in text
    check_demo(text, RETAIN)
    times = re.search(
        r"prefill, median of 2: ([\d.]+) ms -> ([\d.]+) ms\nspeed-up: ([\d.]+)x", text
    )
    assert times is not None
    plain, dart, ratio = map(float, times.groups())
    # Times are printed to a tenth, so times of a few milliseconds leave the ratio that much room.
    assert (plain - 0.06) / (dart + 0.06) - 0.01 <= ratio <= (plain + 0.06) / (dart - 0.06) + 0.01


def test_demo_on_a_saved_model_and_image(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(saved / "photo.png")
    arguments = ["--model", str(saved), "--image", photo, "--prompt", "Who is it?", *EAGER]
    assert load("demo").main([*arguments, *FEW, "--retain-tokens", "5", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert "photo.png 90x60; prompt: 'Who is it?'" in text
    check_demo(text, 5)
    assert "plain text:" in text
    assert "RANDOM" not in text
    assert "trained model" not in text  # a model of one's own is all that is shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.jpg"], "there is no file 'nowhere.jpg'"),
        (["--image", __file__], "not a picture that Pillow can read"),
        (["--model", "./no-such-model"], "there is no folder './no-such-model'"),
        (["--retain-tokens", "16", *EAGER], "no vision token was pruned"),
        (["--layer", "9", *EAGER], "no vision token was pruned"),
        (["--retain-tokens", "-1", *EAGER], "retain_tokens"),
        *slow(
            (
                ["--questions", "1", "--retain-tokens", "576"],
                "the trained model: nothing was pruned",
            ),
        ),
    ],
)
def test_demo_says_what_stopped_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("demo").main(["--tiny", *ONLY_TIMES, *arguments]) == 1
    assert message in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stderr that says whether a person watches it."""

    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.isatty = lambda: watched  # type: ignore[method-assign]


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_shown_to_a_terminal_only(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, stderr = load("progress"), Terminal(watched)
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.working("compiling"):
        pass
    with progress.counting("asking", 2, "question") as bar:
        bar.update(2)
    text = stderr.getvalue()
    if watched:
        assert "compiling: 00:00" in text
        assert "asking:   0%" in text
    else:
        assert text == "compiling ...\n"


def test_the_ceiling_is_as_short_behind_the_cut_as_dart_is() -> None:
    from dartfx.tools.bench.ceiling import shortened

    vlm = load("vlm")
    size = vlm.SIZES["tiny"]
    model = vlm.build_model(size)
    inputs = vlm.random_inputs(size, 3, 2, model, batch=2, images=2)
    assert inputs["input_ids"].shape == (2, 3 + 2 * N + 2)
    kept = 3 + 2 * RETAIN + 2
    ceiling = shortened(model, CUT, kept)
    caches = [vlm.prefill(each, inputs).past_key_values for each in (model, ceiling)]
    assert vlm.cache_lengths(caches[1]) == [3 + 2 * N + 2] * CUT + [kept] * (LAYERS - CUT)
    # The same weights, on the first tokens: causal attention makes them what they were.
    for whole, cut in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(cut.keys, whole.keys[..., : cut.keys.shape[-2], :])


def bench(file: Path, *arguments: str) -> dict[str, Any]:
    """What ``make bench`` writes."""
    assert load("bench_prefill").main(["--tiny", *EAGER, "--json", str(file), *arguments]) == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    return bench(file, "--repeat", "3", "--layers", "3")


def test_bench_counts_flops_exactly(figures: dict[str, Any]) -> None:
    length, kept = figures["sequence"]
    assert (length, kept) == (35 + N + 19, 35 + RETAIN + 19)

    def layer(tokens: int) -> int:
        return 2 * tokens * (4 * 64 * 64 + 3 * 64 * 160) + 4 * tokens * tokens * 64

    flops = figures["flops"]
    full, cut = 3 * layer(length), CUT * layer(length) + layer(kept)
    assert flops["decoder"] == [full, cut]
    # Counted while the model ran, where the report counts from the graph's shapes.
    assert flops["decoder_counted"] == full
    before, after = flops["total"]
    assert before - after == full - cut
    projector, head = 2 * N * (32 * 64 + 64 * 64), 2 * 64 * 512
    assert before > full + projector + head  # and the tower
    assert figures["allowed"] == pytest.approx(before / after)


def test_bench_figures_are_consistent(figures: dict[str, Any]) -> None:
    samples, medians = figures["prefill_samples"], figures["prefill_seconds"]
    assert {name: len(each) for name, each in samples.items()} == dict.fromkeys(medians, 3)
    assert medians == {name: sorted(each)[1] for name, each in samples.items()}
    plain, ceiling, dart = medians.values()
    assert figures["of_allowed"] == pytest.approx(plain / dart / figures["allowed"])
    assert figures["ceiling_of_allowed"] == pytest.approx(plain / ceiling / figures["allowed"])
    rounds = zip(samples["ceiling"], samples["dart"], strict=True)
    assert figures["of_ceiling"] == sorted(best / own for best, own in rounds)[1]
    assert figures["operator_share"] == pytest.approx(figures["operator_seconds"] / dart)
    passes = dict(figures["passes_seconds"])
    total = passes.pop("total")
    assert {"locate", "gather", "check"} <= passes.keys()
    assert 0 < sum(passes.values()) <= total


@pytest.mark.slow
def test_bench_prints_what_it_measured_with_another_selector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = bench(tmp_path / "uniform.json", "--repeat", "1", "--selector", "uniform")
    assert figures["machine"]["selector"] == "uniform"
    assert figures["vision_tokens"] == [N, RETAIN]
    text = capsys.readouterr().out
    assert numbers(r"sequence (\d+) -> (\d+)", text) == figures["sequence"]
    assert numbers(r"all FLOPs +([\d,]+) -> ([\d,]+)", text) == figures["flops"]["total"]
    assert f"of {figures['allowed']:.2f}x" in text
    assert "no goal" in text  # a tiny model in eager mode is held to none
