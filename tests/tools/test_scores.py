"""The evaluation's figures: scores, intervals, tables, and sanity checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dartfx.errors import InputError
from dartfx.tools import evaluate
from dartfx.tools.evaluate.answers import Answers
from dartfx.tools.evaluate.questions import Question
from dartfx.tools.evaluate.results import Results, as_lines
from dartfx.tools.evaluate.scores import MEAN, Sample, chance, score


def graded(answers: str, types: str, pictures: str) -> list[Question]:
    """One question a letter."""
    parts = zip(answers, types, pictures, strict=True)
    return [Question(Path(picture), kind, "?", answer) for answer, kind, picture in parts]


def answered(texts: str, *rows: list[float]) -> Answers:
    """One answer a letter, and the distributions of their first tokens."""
    first = torch.tensor(rows or [[0.5, 0.5]] * len(texts)).log()
    return Answers(tuple(texts), first)


def test_scores_compare_with_the_right_and_with_the_unpruned_answer() -> None:
    questions = graded("abc", "xxx", "111")
    full = answered("abd", [0.5, 0.5], [1.0, 0.0], [0.5, 0.5])
    pruned = answered("Abx", [0.5, 0.5], [0.5, 0.5], [0.25, 0.75])
    values = score(questions, full, pruned)
    assert values["accuracy"].tolist() == [1, 1, 0]
    assert values["agreement"].tolist() == [0, 1, 0]
    want = [0, torch.log(torch.tensor(2.0)).item(), 0.5 * torch.log(torch.tensor(4 / 3)).item()]
    assert values["kl"].tolist() == pytest.approx(want, abs=1e-6)


def test_chance_is_the_commonest_answer_of_each_type() -> None:
    shares = chance(graded("aabcd", "xxxyy", "11111"))
    assert shares == pytest.approx({"x": 2 / 3, "y": 0.5, MEAN: 7 / 12})


def test_intervals_are_of_pictures_not_of_questions() -> None:
    """Ten questions a picture that are all right or all wrong are no more than one."""
    one = graded("a" * 40, "x" * 40, "".join(chr(65 + i) for i in range(40)))
    ten = graded("a" * 400, "x" * 400, "".join(chr(65 + i) for i in range(40) for _ in range(10)))
    right = torch.tensor([1.0, 0.0] * 20)
    few = Sample(one).figures(right)["x"]
    many = Sample(ten).figures(right.repeat_interleave(10))["x"]
    assert few == many
    assert (few.value, few.low) == (0.5, pytest.approx(0.35, abs=0.03))
    alone = Sample(graded("a" * 400, "x" * 400, "".join(map(chr, range(65, 465)))))
    narrow = alone.figures(right.repeat_interleave(10))["x"]
    assert narrow.high - narrow.low < (many.high - many.low) / 2


def test_the_mean_counts_every_type_as_much() -> None:
    sample = Sample(graded("aaaa", "xxxy", "1234"))
    figures = sample.figures(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert [figures[kind].value for kind in ("x", "y", MEAN)] == [1, 0, 0.5]


def results(*kept: tuple[int, str]) -> Results:
    """Of four questions, right answers a, b, c, d: so many retained, one answer a letter."""
    questions = graded("abcd", ["location", "location", "y", "y"], "1234")  # type: ignore[arg-type]
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
    written = made.as_json()["settings"][1]
    assert written["right_by_seed"] == {0: "f", 1: "0"}
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


def test_a_rival_with_another_number_of_tokens_is_shown_with_it() -> None:
    made = results((3, "abcd"))
    questions = made.questions
    key = (2, "downsampled", 3)
    made.add(key, 0, score(questions, answered("abcd"), answered("abxx")))
    made.tokens[key] = 4
    assert "| downsampled | 4 | 100.0 " in made.as_markdown()
    (entry,) = [s for s in made.as_json()["settings"] if s["selector"] == "downsampled"]
    assert (entry["retained"], entry["vision_tokens"]) == (3, 4)
