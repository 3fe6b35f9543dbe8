"""The measure: its questions, its figures, and what must hold of the trained model."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dartfx.errors import InputError
from dartfx.integrations.hf import load_model, prompt_inputs, read_image
from dartfx.ops import select_tokens
from dartfx.selection.registry import get_selector, optional_inputs
from dartfx.tools import evaluate
from dartfx.tools.evaluate import switch
from dartfx.tools.evaluate.answers import Answers, Choice, PrunedModel, encode_once
from dartfx.tools.evaluate.downsample import (
    any_grid,
    grid_of,
    smaller_inputs,
    vision_tokens_of,
)
from dartfx.tools.evaluate.questions import Batch, Question, batches, load
from dartfx.tools.evaluate.results import Results, as_lines
from dartfx.tools.evaluate.resume import Resumed
from dartfx.tools.evaluate.scores import MEAN, Sample, chance, score
from dartfx.tools.evaluate.work import _kind, _shares

ROOT = Path(__file__).parents[2]


def asked(answers: str, types: str, pictures: str) -> list[Question]:
    """One question a letter."""
    parts = zip(answers, types, pictures, strict=True)
    return [Question(Path(picture), kind, "?", answer) for answer, kind, picture in parts]


def answered(texts: str, *rows: list[float]) -> Answers:
    """One answer a letter, and the distributions of their first tokens."""
    first = torch.tensor(rows or [[0.5, 0.5]] * len(texts)).log()
    return Answers(tuple(texts), first)


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


def test_scores_compare_with_the_right_and_with_the_unpruned_answer() -> None:
    questions = asked("abc", "xxx", "111")
    full = answered("abd", [0.5, 0.5], [1.0, 0.0], [0.5, 0.5])
    pruned = answered("Abx", [0.5, 0.5], [0.5, 0.5], [0.25, 0.75])
    values = score(questions, full, pruned)
    assert values["accuracy"].tolist() == [1, 1, 0]
    assert values["agreement"].tolist() == [0, 1, 0]
    want = [0, torch.log(torch.tensor(2.0)).item(), 0.5 * torch.log(torch.tensor(4 / 3)).item()]
    assert values["kl"].tolist() == pytest.approx(want, abs=1e-6)


def test_chance_is_the_commonest_answer_of_each_type() -> None:
    shares = chance(asked("aabcd", "xxxyy", "11111"))
    assert shares == pytest.approx({"x": 2 / 3, "y": 0.5, MEAN: 7 / 12})


def test_intervals_are_of_pictures_not_of_questions() -> None:
    """Ten questions a picture that are all right or all wrong are no more than one."""
    one = asked("a" * 40, "x" * 40, "".join(chr(65 + i) for i in range(40)))
    ten = asked("a" * 400, "x" * 400, "".join(chr(65 + i) for i in range(40) for _ in range(10)))
    right = torch.tensor([1.0, 0.0] * 20)
    few = Sample(one).figures(right)["x"]
    many = Sample(ten).figures(right.repeat_interleave(10))["x"]
    assert few == many
    assert (few.value, few.low) == (0.5, pytest.approx(0.35, abs=0.03))
    alone = Sample(asked("a" * 400, "x" * 400, "".join(map(chr, range(65, 465)))))
    narrow = alone.figures(right.repeat_interleave(10))["x"]
    assert narrow.high - narrow.low < (many.high - many.low) / 2


def test_the_mean_counts_every_type_as_much() -> None:
    sample = Sample(asked("aaaa", "xxxy", "1234"))
    figures = sample.figures(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert [figures[kind].value for kind in ("x", "y", MEAN)] == [1, 0, 0.5]


def results(*kept: tuple[int, str]) -> Results:
    """Of four questions, right answers a, b, c, d: so many retained, one answer a letter."""
    questions = asked("abcd", ["location", "location", "y", "y"], "1234")  # type: ignore[arg-type]
    full = answered("abcd")
    made = Results(questions, 8, score(questions, full, full)["accuracy"])
    for retain, texts in kept:
        made.add((2, "dart", retain), 0, score(questions, full, answered(texts)))
    return made


def test_what_must_hold_is_checked() -> None:
    assert list(evaluate._broken(results((8, "abcd"), (3, "abxx"), (0, "xxxd")))) == []
    [blind] = evaluate._broken(results((0, "abcd")))
    assert "right without one vision token" in blind
    [changed] = evaluate._broken(results((8, "abcx")))
    assert "some answers changed" in changed
    [lost] = evaluate._broken(results((3, "axcd")))
    assert "location 50.0%, unpruned 100.0%" in lost


def test_seeds_are_averaged_and_selectors_compared_question_by_question() -> None:
    made = results((3, "abcd"))
    full = answered("abcd")
    for seed, texts in enumerate(("abcd", "xxxx")):
        made.add((2, "random", 3), seed, score(made.questions, full, answered(texts)))
    assert made.figures((2, "random", 3), "accuracy")[MEAN].value == 0.5
    assert made.differences((2, "random", 3), "dart")[MEAN].value == 0.5
    text = made.as_markdown()
    assert "| random | 3 | 50.0 ±" in text
    assert "| random | 3 | +50.0 ±" in text
    told = made.as_json()["settings"][1]
    assert told["right_by_seed"] == {0: "f", 1: "0"}
    lines = as_lines(made.as_json())
    assert json.loads(lines) == json.loads(json.dumps(made.as_json()))
    assert sum('"selector"' in line for line in lines.splitlines()) == 2


def test_a_layer_that_has_read_the_picture_is_void() -> None:
    """It answers as well with no vision token left, so that no selector can lose anything."""
    made = results((8, "abcd"), (0, "xxxd"))
    assert made.void() == []
    assert "layer 2 | 0 | 0.0 ±" in made.as_markdown()
    made.add((3, "dart", 0), 0, score(made.questions, answered("abcd"), answered("abcd")))
    assert made.void() == [(3, "dart", 0)]
    assert made.as_json()["void_layers"] == [3]
    text = made.as_markdown()
    assert "| layer 3: void | 0 | 100.0 ±" in text
    assert text.index("layer 3: void") < text.index("pruned before layer 2")


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
    with pytest.raises(InputError, match="unknown: drat; registered: cover, dart, fastv"):
        evaluate.run(parsed("--questions", there, "--selectors", "drat"))


def test_all_and_none_are_measured_first_and_once_a_layer() -> None:
    asked = ["--retain", "9", "4", "0", "--retain-elsewhere", "0", "3", "--layers", "2", "1"]
    plan = list(evaluate._plan(parsed(*asked, "--selectors", "dart", "random"), 8))
    found = [(layer, choices[0].retain) for layer, choices in plan]
    assert found == [(2, 9), (2, 0), (2, 4), (1, 0), (1, 3)]
    one, several = [("dart", 0)], [("dart", 0), ("random", 0), ("random", 1), ("random", 2)]
    drawn = [[(c.selector, c.seed) for c in choices] for _, choices in plan]
    assert drawn == [one, one, several, one, several]
    assert all(len({c.retain for c in choices}) == 1 for _, choices in plan)


def test_one_selector_stands_for_others_while_they_are_asked_for() -> None:
    torch.manual_seed(0)
    vision = torch.zeros(1, 20, dtype=torch.bool)
    vision[:, 4:16] = True
    case = {
        "hidden": torch.randn(1, 20, 8),
        "keys": torch.randn(1, 2, 20, 4),
        "queries": torch.randn(1, 4, 20, 4),
        "vision_mask": vision,
        "retain": 5,
    }
    for names in (("dart", "spread"), ("fastv", "tiled")):
        standing = switch.name_for(names)
        for name in names:
            with switch.selecting(name):
                kept = select_tokens(**case, selector=standing)
            assert torch.equal(kept, select_tokens(**case, selector=name))
    assert "queries" not in optional_inputs(switch.name_for(("dart", "spread")))


def halves(write: bool = False, retain: int = 2) -> torch.fx.GraphModule:
    """x and masks to what is left of x: traced, with the selection in the middle."""

    def pruned(x: torch.Tensor, keys: torch.Tensor, vision: torch.Tensor) -> tuple[Any, ...]:
        early = torch.nn.functional.gelu(x)
        given = (early, keys, vision, None, 4, retain, 4, 4, "uniform", "auto")
        keep = torch.ops.dartfx.select_tokens(*given)
        late = x.gather(1, keep[:, :, None].expand(-1, -1, 3)) + keep.shape[1]
        if write:
            late = late + early.sum()
            early.add_(keep.sum())
        return early, late

    example = (torch.zeros(1, 6, 3), torch.zeros(1, 1, 6, 2), torch.ones(1, 6, dtype=torch.bool))
    return make_fx(pruned, tracing_mode="symbolic")(*example)


def test_what_comes_before_the_selection_is_computed_once_for_each_input() -> None:
    whole, vision = halves(), torch.tensor([[False, True, True, True, True, False]])
    resumed, counted = Resumed(whole), []
    first = resumed._first.forward
    resumed._first.forward = lambda *given: counted.append(1) or first(*given)  # type: ignore[func-returns-value]
    for value, times in ((1.0, 1), (1.0, 1), (2.0, 2)):
        inputs = (torch.full((1, 6, 3), value), torch.zeros(1, 1, 6, 2), vision)
        for one, other in zip(resumed(*inputs), whole(*inputs), strict=True):
            assert torch.equal(one, other)
        assert len(counted) == times


def test_another_number_of_tokens_needs_no_other_graph() -> None:
    vision = torch.tensor([[False, True, True, True, True, False]])
    inputs = (torch.arange(18.0).view(1, 6, 3), torch.zeros(1, 1, 6, 2), vision)
    resumed = Resumed(halves())
    for retain in (2, 3, 1):
        resumed.retain(retain)
        for one, other in zip(resumed(*inputs), halves(retain=retain)(*inputs), strict=True):
            assert torch.equal(one, other)


def test_inputs_written_to_are_those_of_each_call() -> None:
    """As the states of convolutions in a cache, in front of the cut and behind it."""

    def pruned(x: torch.Tensor, keys: torch.Tensor, vision: torch.Tensor, *states: torch.Tensor):
        early = torch.nn.functional.gelu(x)
        states[0].copy_(early[:, -1])
        own = torch.zeros_like(early[:, -1])
        keep = torch.ops.dartfx.select_tokens(
            early, keys, vision, None, 4, 2, 4, 4, "uniform", "auto"
        )
        late = x.gather(1, keep[:, :, None].expand(-1, -1, 3))
        states[1].copy_(late[:, 1])
        return late + early.sum(), own.copy_(late[:, 1]), early[:, 0]

    def fresh() -> tuple[torch.Tensor, ...]:
        vision = torch.tensor([[False, True, True, True, True, False]])
        x = torch.arange(18.0).view(1, 6, 3)
        return x, torch.zeros(1, 1, 6, 2), vision, torch.zeros(1, 3), torch.zeros(1, 3)

    whole = make_fx(pruned, tracing_mode="symbolic")(*fresh())
    resumed = Resumed(whole)
    wanted = fresh()
    result = whole(*wanted)
    for _ in range(2):
        inputs = fresh()
        made = resumed(*inputs)
        for one, other in zip((*made, *inputs), (*result, *wanted), strict=True):
            assert torch.equal(one, other)
        for value in made:
            value.add_(1)  # as decode does to states
    assert wanted[3].any()
    assert wanted[4].any()


def test_a_graph_that_writes_to_what_is_remembered_is_not_halved() -> None:
    with pytest.raises(ValueError, match="written to behind the selection"):
        Resumed(halves(write=True))


def test_pixels_are_encoded_once() -> None:
    class Base(torch.nn.Module):
        calls = 0

        def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return pixel_values * 2

    base, pixels = Base(), torch.ones(2)
    encode_once(base)
    for given, calls in ((pixels, 1), (pixels, 1), (torch.ones(2), 2)):
        assert base.get_image_features(pixel_values=given).tolist() == [2, 2]
        assert base.calls == calls
    encode_once(torch.nn.Linear(2, 2))  # has nothing to encode


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


def test_earlier_measures_are_shown_together(tmp_path: Path) -> None:
    one, other = results((8, "abcd"), (3, "abcx"), (0, "xxxx")), results((3, "axcx"))
    other.values[2, "cover", 3] = other.values.pop((2, "dart", 3))
    other.tokens[2, "cover", 3] = 4
    questions, parts = one.questions, [json.loads(as_lines(e.as_json())) for e in (one, other)]
    made = Results.of_json(questions, parts)
    assert made.as_json()["settings"] == [*parts[0]["settings"], *parts[1]["settings"]]
    assert len(made.as_json()["made_with"]) == 2
    again = Results.of_json(questions, [json.loads(as_lines(made.as_json()))])
    assert again.as_json() == made.as_json()
    one.add((2, "cover", 3), 0, score(questions, answered("abcd"), answered("axcx")))
    one.tokens[2, "cover", 3] = 4
    assert made.differences((2, "cover", 3), "dart") == one.differences((2, "cover", 3), "dart")
    assert made.as_markdown() == one.as_markdown()
    with pytest.raises(InputError, match="no file has a setting that keeps all 8 vision tokens"):
        Results.of_json(questions, parts[1:])
    with pytest.raises(InputError, match="unpruned differ"):
        Results.of_json(questions, [parts[0], {**parts[1], "unpruned": {}}])
    arguments = parsed("--from", str(tmp_path / "none.json"))
    arguments.questions = ROOT / evaluate.QUESTIONS
    with pytest.raises(InputError, match="cannot read"):
        evaluate.run(arguments)


def test_a_rival_with_another_number_of_tokens_is_shown_with_it() -> None:
    made = results((3, "abcd"))
    questions = made.questions
    key = (2, "downsampled", 3)
    made.add(key, 0, score(questions, answered("abcd"), answered("abxx")))
    made.tokens[key] = 4
    assert "| downsampled | 4 | 100.0 " in made.as_markdown()
    (entry,) = [s for s in made.as_json()["settings"] if s["selector"] == "downsampled"]
    assert (entry["retained"], entry["vision_tokens"]) == (3, 4)


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
    told = json.loads((tmp_path / "figures.json").read_text())
    assert [s["retained"] for s in told["settings"]] == [576, 0, 192]
    assert told["unpruned"]["location"][0] > 0.9
