"""The small model's data and training program, and the weights that ship with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_vlm"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Its programs import one another by file name."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = FOLDER / "model"
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def test_splits_share_no_digit() -> None:
    data = module("data")
    scans = {name: data._digits(name)[0] for name in ("train", "validation", "test")}
    assert sum(map(len, scans.values())) == 1797
    seen = {name: {scan.tobytes() for scan in some} for name, some in scans.items()}
    assert not seen["test"] & (seen["train"] | seen["validation"])
    assert not seen["train"] & seen["validation"]


def test_answers_are_what_the_scene_holds() -> None:
    data = module("data")
    supply = data.Scenes("validation", 0)
    for _ in range(20):
        scene = supply.scene()
        asked = data.questions(scene)
        assert asked["count"] == [("how many digits ?", str((scene.digits >= 0).sum()))]
        for question, answer in asked["cell"]:
            words = question.split()
            at = data.NUMBERS.index(words[3]), data.NUMBERS.index(words[5])
            assert scene.digits[at] == int(answer)
        for question, answer in asked["colour_code"]:
            at = int(question[-1]) - 1, "abcd".index(question[-2])
            assert data.NAMES[scene.colours[at]] == answer
        for question, answer in asked["digit_of"]:
            colour = data.NAMES.index(question.split()[-2])
            assert scene.digits[scene.colours == colour].tolist() == [int(answer)]
        for question, answer in asked["read"]:
            row = scene.digits[data.NUMBERS.index(question.split()[2])]
            assert [int(word) for word in answer.split()] == row[row >= 0].tolist()
        for _, answer in asked["largest"]:
            assert int(answer) in scene.digits[scene.sizes == scene.sizes.max()]
        assert scene.anchor.sum() == (scene.digits >= 0).sum()


def test_patch_labels_lie_in_their_cells() -> None:
    data = module("data")
    scene = data.Scenes("train", 0, fewest=6, most=6).scene()
    per_cell = scene.patch_digit.reshape(4, 6, 4, 6).swapaxes(1, 2).reshape(4, 4, 36)
    for place in np.ndindex(4, 4):
        inked = set(per_cell[place].tolist()) - {data.EMPTY_DIGIT}
        assert inked == ({scene.digits[place]} if scene.digits[place] >= 0 else set())


def test_packed_questions_are_answered_as_alone(shipped: tuple[Any, Any]) -> None:
    """Many questions in one training sequence give the logits of a prompt with one of them."""
    train, vision, data = module("train_decoder"), module("train_vision"), module("data")
    model, _ = shipped
    scene = data.Scenes("validation", 3, fewest=5).scene()
    pixels = vision.pixels([scene])
    with torch.no_grad():
        features = module("model").patch_features(model, pixels)
        text = train.pack([scene], np.random.default_rng(0), 128, 1)
        packed = train.answer_logits(model, features, None, text)
        checked = 0
        for number in range(0, int(text.block.max()) + 1, 4):
            at = text.block[0] == number
            words = text.words[0][at]
            ids = torch.cat([torch.tensor([data.BOS] + [data.IMAGE] * 576), words])[None]
            alone = model(input_ids=ids, pixel_values=pixels).logits[0, 577:]
            answers = text.target[0][at] >= 0
            mine = (text.block[0] == number)[text.target[0] >= 0]
            torch.testing.assert_close(packed[mine], alone[answers], atol=1e-4, rtol=1e-4)
            checked += 1
        assert checked > 2


def test_the_shipped_model_is_the_programs(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    built = module("model").build()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in built.named_parameters()
    }
    export, data = module("export"), module("data")
    assert processor.tokenizer.get_vocab() == export.build_processor().tokenizer.get_vocab()
    scene = data.Scenes("validation", 0).scene()
    made = processor(images=scene.image, text="<image> how many digits ?", return_tensors="pt")
    wanted = module("train_vision").pixels([scene])
    torch.testing.assert_close(made["pixel_values"], wanted, atol=1e-5, rtol=1e-5)
    words = [data.VOCABULARY[w] for w in ("how", "many", "digits", "?")]
    assert made["input_ids"][0].tolist() == [data.BOS, *[data.IMAGE] * 576, *words]


def test_held_out_questions_come_from_the_program(tmp_path: Path) -> None:
    module("export").export_questions(tmp_path)
    shipped = FOLDER / "heldout"
    assert (tmp_path / "questions.jsonl").read_text() == (shipped / "questions.jsonl").read_text()
    from PIL import Image

    for name in ("000.png", "127.png"):
        with Image.open(tmp_path / name) as made, Image.open(shipped / name) as kept:
            assert np.array_equal(np.asarray(made), np.asarray(kept))


def test_training_resumes_where_it_stopped(
    tmp_path: Path,
) -> None:
    training = module("training")
    module_ = torch.nn.Linear(2, 1)
    run = training.Run("a", tmp_path, module_, 1.0, 0.1)
    for _ in range(3):
        run.step(module_(torch.ones(1, 2)).square().sum())
    run.record(accuracy=1)
    run.close()
    other = torch.nn.Linear(2, 1)
    again = training.Run("a", tmp_path, other, 1.0, 0.1)
    assert (again.steps, again.log[0]["accuracy"]) == (3, 1)
    assert again.elapsed == run.elapsed > 0
    torch.testing.assert_close(other.weight, module_.weight)
    again.close()
