"""The evaluation: its questions and figures, and properties of the trained model."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dartfx.errors import InputError
from dartfx.integrations.hf import load_model, prompt_inputs, read_image
from dartfx.selection.registry import get_selector
from dartfx.tools import evaluate
from dartfx.tools.evaluate.answers import Choice, PrunedModel
from dartfx.tools.evaluate.downsample import (
    any_grid,
    grid_of,
    smaller_inputs,
    vision_tokens_of,
)
from dartfx.tools.evaluate.questions import Batch, Question, batches, load
from dartfx.tools.evaluate.work import _kind, _shares

ROOT = Path(__file__).parents[2]


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    return parser.parse_args(argv)


def test_questions_are_read_relative_to_their_file(tmp_path: Path) -> None:
    lines = [
        {"image": f"{i}.png", "type": "a", "question": "q", "answer": i, "more": 1}
        for i in (7, 7, 8)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = load(path)
    assert found[0] == Question(tmp_path / "7.png", "a", "q", "7")
    assert len(found) == 3
    assert load(path, pictures=1) == found[:2]


@pytest.mark.parametrize("line", ["{", "[]", '{"image": "a"}', "3"])
def test_a_line_that_is_no_question_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "a", "type": "b", "question": "c", "answer": "d"}\n' + line)
    with pytest.raises(ValueError, match=r"line 2: not a question like"):
        load(path)


def test_key_norm_keeps_the_largest_keys() -> None:
    keys = torch.tensor([5.0, 1.0, -4.0, 3.0, 2.0]).reshape(1, 1, 5, 1)
    vision = torch.tensor([[False, True, True, True, True]])
    kept = get_selector("key_norm")(
        keys[:, 0],
        keys,
        vision,
        ~vision,
        torch.tensor([2]),
        pivot_image_tokens=4,
        pivot_text_tokens=4,
    )
    assert kept.tolist() == [[False, False, True, True, False]]


def test_a_wrong_call_is_answered_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no questions at"):
        evaluate.run(parsed("--questions", str(tmp_path / "none")))
    there = str(ROOT / evaluate.QUESTIONS)
    with pytest.raises(InputError, match="unknown: drat; registered: attended, cover, dart"):
        evaluate.run(parsed("--questions", there, "--selectors", "drat"))


def test_an_earlier_measure_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    arguments = parsed("--from", str(tmp_path / "none.json"))
    arguments.questions = ROOT / evaluate.QUESTIONS
    with pytest.raises(InputError, match="cannot read"):
        evaluate.run(arguments)


def test_all_and_none_are_measured_first_and_once_a_layer() -> None:
    arguments = ["--retain", "9", "4", "0", "--retain-elsewhere", "0", "3", "--layers", "2", "1"]
    plan = list(evaluate._plan(parsed(*arguments, "--selectors", "dart", "random"), 8))
    found = [(layer, choices[0].retain) for layer, choices in plan]
    assert found == [(2, 9), (2, 0), (2, 4), (1, 0), (1, 3)]
    one, several = [("dart", 0)], [("dart", 0), ("random", 0), ("random", 1), ("random", 2)]
    drawn = [[(c.selector, c.seed) for c in choices] for _, choices in plan]
    assert drawn == [one, one, several, one, several]
    assert all(len({c.retain for c in choices}) == 1 for _, choices in plan)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model(str(ROOT / evaluate.MODEL))


def made_by(tiny: tuple[Any, Any]) -> Any:
    return partial(prompt_inputs, tiny[1])


def test_batches_have_no_pads_and_equal_numbers_of_rows(tiny: tuple[Any, Any]) -> None:
    questions = load(ROOT / evaluate.QUESTIONS, pictures=2)
    made = batches(questions, made_by(tiny), 4)
    assert sorted(n for batch in made for n in batch.numbers) == list(range(len(questions)))
    assert {len(batch.inputs["input_ids"]) for batch in made} == {4}
    assert min(len(batch.numbers) for batch in made) < 4
    (alone,) = batches(questions[:1], made_by(tiny), 4)
    assert alone.inputs["input_ids"].shape[0] == 2
    assert all(bool(batch.inputs["attention_mask"].all()) for batch in made)


def test_a_selector_says_what_becomes_of_dropped_tokens() -> None:
    ways = {"dart": (False, False), "dart+merge": (True, False), "dart+calibrate": (False, True)}
    for name, way in (ways | {"dart+merge+calibrate": (True, True)}).items():
        choice = Choice(name, 4, 0)
        assert (choice.name, choice.merges, choice.calibrates) == ("dart", *way)


def test_each_model_is_compiled_by_one_process_and_the_work_is_shared() -> None:
    plan = list(evaluate._plan(parsed(), 576))
    kinds = [_kind(task, 576) for task in plan]
    shares = _shares(plan, 576, 2)
    assert len({*zip(kinds, shares, strict=True)}) == len(set(kinds)) == 9
    work = [sum(len(plan[i][1]) for i in range(len(plan)) if shares[i] == n) for n in (0, 1)]
    assert sorted(work) == [84, 89]
    assert set(_shares(plan, 576, 99)) == set(range(9))


def test_a_smaller_picture_keeps_its_shape_and_about_the_number_of_tokens(
    tiny: tuple[Any, Any],
) -> None:
    assert [grid_of((24, 24), n) for n in (16, 64, 128, 192)] == [
        (4, 4),
        (8, 8),
        (11, 11),
        (14, 14),
    ]
    assert grid_of((20, 36), 192) == (10, 18)
    model, processor = tiny
    picture = read_image(load(ROOT / evaluate.QUESTIONS, pictures=1)[0].image)
    inputs = smaller_inputs(processor, picture, "how many digits ?", tokens=128, of=576)
    assert inputs["pixel_values"].shape == (1, 3, 44, 44)
    assert vision_tokens_of(processor, [Batch((0,), inputs)]) == 121
    with pytest.raises(ValueError, match="doesn't match model"):
        model(**inputs)
    with any_grid(model):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    with pytest.raises(InputError, match=r"'downsampled' is not possible here: 500 vision tokens"):
        smaller_inputs(processor, picture, "how many digits ?", tokens=128, of=500)


@pytest.mark.slow
def test_merging_is_measured_with_the_selector_that_it_is_named_after(
    tiny: tuple[Any, Any],
) -> None:
    choice = Choice("uniform+merge", 48, 0)
    assert (choice.merges, choice.name) == (True, "uniform")
    given = (tiny[1], batches(load(ROOT / evaluate.QUESTIONS, pictures=1), made_by(tiny), 16), 2)
    merged = PrunedModel(tiny[0], 2, 48, ["uniform"], merge=True).answer(*given, choice)
    plain = PrunedModel(tiny[0], 2, 48, ["uniform"]).answer(*given, Choice("uniform", 48, 0))
    assert merged.first.shape == plain.first.shape
    assert not torch.equal(merged.first, plain.first)


@pytest.mark.slow
def test_one_compilation_gives_what_one_for_each_number_of_tokens_gives(
    tiny: tuple[Any, Any],
) -> None:
    """To the bit, for selectors with and without queries; and not the same for all of them."""
    questions = load(ROOT / evaluate.QUESTIONS, pictures=2)
    given = (tiny[1], batches(questions, made_by(tiny), 16), 2)
    choices = [Choice(name, 48, 0) for name in ("dart", "fastv")]
    fresh = PrunedModel(tiny[0], 2, 48, ["dart", "fastv"])
    want = [fresh.answer(*given, choice) for choice in choices]
    shared = PrunedModel(tiny[0], 2, 9, ["dart", "fastv"])
    few = shared.answer(*given, Choice("dart", 9, 0))
    for choice, expected in zip(choices, want, strict=True):
        found = shared.answer(*given, choice)
        assert found.texts == expected.texts
        assert torch.equal(found.first, expected.first)
    assert not torch.equal(few.first, want[0].first)
    assert not torch.equal(want[0].first, want[1].first)


@pytest.mark.slow
def test_quick_holds_of_the_trained_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Identity with all tokens, near chance with none, little lost on location with a third."""
    arguments = parsed("--quick", "--json", str(tmp_path / "figures.json"))
    arguments.model, arguments.questions = ROOT / evaluate.MODEL, ROOT / evaluate.QUESTIONS
    assert evaluate.run(arguments) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [s["retained"] for s in written["settings"]] == [576, 0, 192]
    assert written["unpruned"]["location"][0] > 0.9
