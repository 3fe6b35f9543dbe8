"""The small model's data and training program, and the weights that ship with it."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dartfx.integrations.hf import load_model, prompt_inputs
from dartfx.tools.evaluate.answers import answer as answers_of
from dartfx.tools.evaluate.questions import batches, load
from tests.support.tolerances import CLOSE, PIXELS

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


@pytest.mark.parametrize("name", ["COARSE", "FINE"])
def test_answers_are_what_the_scene_holds(name: str) -> None:
    data, world = module("data"), module("world")
    supply = data.Scenes("validation", 0, world=getattr(world, name))
    for _ in range(20):
        scene = supply.scene()
        asked = data.questions(scene)
        assert asked["count"] == [("how many digits ?", str((scene.digits >= 0).sum()))]
        for question, answer in asked["cell"]:
            words = question.split()
            at = world.NUMBERS.index(words[3]), world.NUMBERS.index(words[5])
            assert scene.digits[at] == int(answer)
        for question, answer in asked["colour_code"]:
            at = int(question[-1]) - 1, "abcdef".index(question[-2])
            assert world.NAMES[scene.colours[at]] == answer
        for question, answer in asked["digit_of"]:
            colour = world.NAMES.index(question.split()[-2])
            assert scene.digits[scene.colours == colour].tolist() == [int(answer)]
        for question, answer in asked["read"]:
            row = scene.digits[world.NUMBERS.index(question.split()[2])]
            assert [int(word) for word in answer.split()] == row[row >= 0].tolist()
        for _, answer in asked["largest"]:
            assert int(answer) in scene.digits[scene.sizes == scene.sizes.max()]
        assert scene.anchor.sum() == (scene.digits >= 0).sum()


@pytest.mark.parametrize("name", ["COARSE", "FINE"])
def test_patch_labels_lie_in_their_cells(name: str) -> None:
    data, world = module("data"), getattr(module("world"), name)
    scene = data.Scenes("train", 0, fewest=6, most=6, world=world).scene()
    n, side, end = world.cells, world.cell, world.grid - world.margin
    inner = scene.patch_digit[world.margin : end, world.margin : end]
    per_cell = inner.reshape(n, side, n, side).swapaxes(1, 2).reshape(n, n, side * side)
    for place in np.ndindex(n, n):
        inked = set(per_cell[place].tolist()) - {module("world").EMPTY_DIGIT}
        assert inked == ({scene.digits[place]} if scene.digits[place] >= 0 else set())


@pytest.mark.parametrize("name", ["coarse", "fine", "hybrid"])
def test_packed_questions_are_answered_as_alone(name: str) -> None:
    """Many questions in one training sequence give the logits of a prompt with one of them."""
    if name == "hybrid" and not hasattr(transformers, "Lfm3Config"):
        pytest.skip("a transformers without LFM3")
    packing, world = module("packing"), module("world")
    torch.manual_seed(0)
    variant = module("variants").VARIANTS[name]
    model = module("model").build(variant).eval()
    scene = module("data").Scenes("validation", 3, fewest=5, world=variant.world).scene()
    pixels = module("train_vision").pixels(scene.image[None])
    # As it is shipped, with windows in the attention of the layers in front of the cut.
    shipped = model if name != "hybrid" else module("export").as_lfm3(model).eval()
    tokens, copies = variant.world.tokens, 2 * variant.convolutions
    with torch.no_grad():
        features = module("model").patch_features(model, pixels)
        text = packing.pack([scene], np.random.default_rng(0), 128, 1, copies).to("cpu")
        alone, answers = {}, torch.zeros_like(text.words, dtype=torch.bool)
        answers.view(-1)[text.at] = True
        for number in (0, int(text.block.max())):
            at = (text.block[0] == number) & (text.words[0] >= 0)
            words = text.words[0][at]
            ids = torch.cat([torch.tensor([world.BOS] + [world.IMAGE] * tokens), words])[None]
            logits = shipped(input_ids=ids, pixel_values=pixels).logits[0, 1 + tokens :]
            alone[number] = logits[answers[0][at]]
        model.model.language_model.set_attn_implementation("packed")
        packed = packing.answer_logits(model, features, None, text)
    for number, wanted in alone.items():
        mine = (text.block[0] == number)[answers[0]]
        torch.testing.assert_close(packed[mine], wanted, **CLOSE)


def test_the_shipped_model_is_the_programs(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    built = module("model").build()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in built.named_parameters()
    }
    export, data, world = module("export"), module("data"), module("world")
    assert processor.tokenizer.get_vocab() == export.build_processor().tokenizer.get_vocab()
    scene = data.Scenes("validation", 0).scene()
    made = processor(images=scene.image, text="<image> how many digits ?", return_tensors="pt")
    wanted = module("train_vision").pixels(scene.image[None])
    torch.testing.assert_close(made["pixel_values"], wanted, **PIXELS)
    words = [world.COARSE.vocabulary[w] for w in ("how", "many", "digits", "?")]
    assert made["input_ids"][0].tolist() == [world.BOS, *[world.IMAGE] * 576, *words]


@pytest.mark.parametrize("name", ["fine", "hybrid"])
def test_the_other_models_answer_what_they_never_saw(name: str) -> None:
    """With stock transformers, from the folder alone; 8 of 10 where guessing gives 2."""
    if name == "hybrid" and not hasattr(transformers, "Lfm3Config"):
        pytest.skip("a transformers without LFM3")
    variant = module("variants").VARIANTS[name]
    model, processor = load_model(str(FOLDER / variant.folder))
    asked = load(FOLDER / variant.questions / "questions.jsonl", pictures=2)[:10]
    given = answers_of(model, processor, batches(asked, partial(prompt_inputs, processor), 10), 8)
    right = [text == question.answer for text, question in zip(given.texts, asked, strict=True)]
    assert sum(right) >= 8, given.texts


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_held_out_questions_come_from_the_program(name: str, tmp_path: Path) -> None:
    variant = module("variants").VARIANTS[name]
    module("export").export_questions(tmp_path, variant)
    shipped = FOLDER / variant.questions
    assert (tmp_path / "questions.jsonl").read_text() == (shipped / "questions.jsonl").read_text()
    from PIL import Image

    for name in ("000.png", f"{variant.pictures - 1:03}.png"):
        with Image.open(tmp_path / name) as made, Image.open(shipped / name) as kept:
            assert np.array_equal(np.asarray(made), np.asarray(kept))


def test_training_resumes_where_it_stopped(
    tmp_path: Path,
) -> None:
    training = module("training")
    module_ = torch.nn.Linear(2, 1)
    given = {"folder": tmp_path, "weights": tmp_path / "half", "rate": 0.1, "every": 60.0}
    run = training.Run("a", Namespace(**given), module_, 1.0)
    for _ in range(3):
        run.step(module_(torch.ones(1, 2)).square().sum())
    run.record(accuracy=1)
    run.close()
    other = torch.nn.Linear(2, 1)
    again = training.Run("a", Namespace(**given), other, 1.0)
    assert (again.steps, again.log[0]["accuracy"]) == (3, 1)
    assert again.elapsed == run.elapsed > 0
    torch.testing.assert_close(other.weight, module_.weight)
    again.close()
    half = torch.load(tmp_path / "half" / "a.pt")["module"]
    assert torch.equal(half["weight"], module_.weight.half())
