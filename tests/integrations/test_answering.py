"""Code shared by adapters: batches of prompts, answers, losses, and counts of pruned prompts."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dartfx.errors import ConfigError, InputError, UnsupportedGraphError
from dartfx.integrations.answering import Answering, Settings
from dartfx.integrations.hf import load_model
from dartfx.integrations.lmms_requests import OnDemand, document, from_visuals, settings_of
from dartfx.integrations.prompts import Prompts
from dartfx.tools.evaluate import questions
from tests.support.tolerances import LIKELIHOOD, LIKELIHOOD_BY_STEPS

TINY = Path(__file__).parents[2] / "examples" / "tiny_vlm"
ASKED = questions.load(TINY / "heldout" / "questions.jsonl", pictures=1)[1::2]  # of several lengths
RETAIN = 64
PRUNED = {"retain_tokens": RETAIN, "lowering": "eager"}
SHORT = Settings(max_new_tokens=2)


@functools.cache
def loaded() -> tuple[Any, Any]:
    return load_model(str(TINY / "model"), "cpu")


@functools.cache
def conversations() -> list[Any]:
    return [from_visuals(q.text, [Image.open(q.image)]) for q in ASKED]


def answering(options: dict[str, Any] | None = None, **how: Any) -> Answering:
    model, processor = loaded()
    return Answering(copy.deepcopy(model), processor, options, **how)


def answers(of: Answering, settings: Settings = SHORT, *, count: int | None = None) -> list[str]:
    """To the first ``count`` questions, or to all of them."""
    given = conversations()[:count]
    found = dict(of.answer(given, [settings] * len(given)))
    return [found[number].text for number in range(len(given))]


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch() -> None:
    alone, together = answering(PRUNED), answering(PRUNED, batch_size=8)
    assert answers(together) == answers(alone)
    # A word is a token, and so is the start of the text.
    longest = max(len(q.text.split()) for q in ASKED) + 576 + 1
    assert together.tally.tokens == len(ASKED) * longest
    assert together.tally.kept == len(ASKED) * (longest - 576 + RETAIN)
    assert together.tally.pruned == together.tally.prompts == len(ASKED)
    assert f"{len(ASKED)} of {len(ASKED)} prompts with images" in str(together.tally)
    assert "576 per prompt, 64 retained, dropped before layer 2" in str(together.tally)


def test_unpruned_answers_are_those_of_generate() -> None:
    model, processor = loaded()
    alone = answering(None)
    expected = []
    for q in ASKED:
        text = f"<image> {q.text}"
        inputs = processor(images=Image.open(q.image), text=text, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        new = new[:, inputs["input_ids"].shape[1] :]
        expected += processor.batch_decode(new, skip_special_tokens=True)
    assert answers(alone) == expected
    assert alone.tally.with_vision == len(ASKED)
    assert alone.tally.pruned == 0


@pytest.mark.slow
def test_losses_are_those_of_tokens_fed_one_by_one() -> None:
    given, said = conversations()[:3], [" 4", " 8 red", " green"]
    alone, together = answering(PRUNED), answering(PRUNED, batch_size=3)
    one, three = dict(alone.losses(given, said)), dict(together.losses(given, said))
    model, processor = alone.model, loaded()[1]
    for i, (conversation, text) in enumerate(zip(given, said, strict=True)):
        assert three[i] == (pytest.approx(one[i][0], rel=LIKELIHOOD), one[i][1])
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )  # fmt: skip
        total, greedy, cache = 0.0, True, None
        target = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        for place, token in enumerate(target):
            length = inputs["input_ids"].shape[1] + place
            step = dict(inputs) if place == 0 else {
                "input_ids": torch.tensor([[target[place - 1]]]),
                "attention_mask": torch.ones((1, length), dtype=torch.long),
                "position_ids": torch.tensor([[length - 1]]),
                "past_key_values": cache,
            }  # fmt: skip
            with torch.no_grad():
                output = model(**step, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].log_softmax(-1)
            total -= float(logits[token])
            greedy &= int(logits.argmax()) == token
        assert one[i] == (pytest.approx(total / len(target), rel=LIKELIHOOD_BY_STEPS), greedy)


def test_a_prompt_that_ran_unpruned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = answering(PRUNED)
    monkeypatch.setattr(silent.model, "_compiled_call_impl", None)  # as past a recompile limit
    with pytest.raises(UnsupportedGraphError, match="ran unpruned"):
        answers(silent)
    lax = answering({**PRUNED, "on_unsupported": "warn"})
    monkeypatch.setattr(lax.model, "_compiled_call_impl", None)
    answers(lax)
    assert (lax.tally.with_vision, lax.tally.pruned) == (len(ASKED), 0)


def test_keeping_all_tokens_is_reported_and_no_error() -> None:
    everything = answering({**PRUNED, "retain_tokens": 576})
    assert answers(everything, count=1) == answers(answering(None), count=1)
    assert everything.tally.all_retained
    assert "0 of 1 prompts" in str(everything.tally)
    assert "nothing to drop: 576 tokens to retain of 576" in str(everything.tally)


def test_text_alone_is_answered_and_not_pruned() -> None:
    of = answering(PRUNED, batch_size=4)
    text = from_visuals("how many digits ?", None)
    once = Settings(max_new_tokens=1)
    found = dict(of.answer([text, conversations()[0], text], [once] * 3))
    assert sorted(found) == [0, 1, 2]
    assert (of.tally.prompts, of.tally.with_vision, of.tally.pruned) == (3, 1, 1)
    assert found[0] == found[2]
    assert found[0].read == 5


def test_batches_hold_equal_settings_and_pictures_only() -> None:
    text = from_visuals("how many digits ?", None)
    two = from_visuals("how many digits ?", [Image.new("RGB", (50, 40))] * 2)
    given = [text, *conversations()[:3], two]
    settings = [SHORT, SHORT, Settings(max_new_tokens=5), SHORT, SHORT]
    made = list(Prompts(loaded()[1], 8).batches(given, settings))
    assert sorted(sorted(batch.numbers) for batch in made) == [[0], [1, 3], [2], [4]]
    assert [batch.sees for batch in made if 0 in batch.numbers] == [False]
    (pair,) = [batch.inputs for batch in made if len(batch.numbers) == 2]
    assert pair["attention_mask"][:, -1].all()  # what is padded is padded on the left


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ({"retain_token": 4}, {}, "retain_tokens"),
        (PRUNED, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answering(options, **how)


@pytest.mark.parametrize(
    ("text", "message"), [("", "no token"), (" 4 <eos> 5", "end of text inside")]
)
def test_continuations_without_a_likelihood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(answering(None).losses(conversations()[:1], [text]))


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(InputError, match="'floaty' is not a torch dtype"):
        load_model(str(TINY / "model"), "cpu", "floaty")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False}, Settings(16)),
        ({"until": ["\n\n", ""], "top_p": 0.5}, Settings(until=("\n\n",))),
        ({"temperature": 0.7, "top_p": 0.9}, Settings(1024, True, 0.7, 0.9)),
        ({"temperature": 0, "do_sample": True}, Settings()),
        ({"do_sample": True, "num_beams": 2}, Settings(1024, True, beams=2)),
        ({"until": "."}, Settings(until=(".",))),
    ],
)
def test_generation_arguments(given: dict[str, Any], expected: Settings) -> None:
    ignored: set[str] = set()
    assert settings_of({**given, "image_aspect_ratio": "pad"}, ignored) == expected
    assert ignored == {"image_aspect_ratio"}


def test_an_answer_ends_where_a_task_says() -> None:
    settings = Settings(until=("\n\n", "stop"))
    assert settings.cut("4 stop\n\n5") == "4 "
    assert settings.cut("4") == "4"


def test_documents_are_looked_up_and_made_on_demand() -> None:
    tasks = {"pope": {"test": ["zero", "one"]}}
    assert document(tasks, ("context", {}, None, 1, "pope", "test")) == "one"
    with pytest.raises(ValueError, match="acc_mutual_info"):
        document(tasks, ("", "yes"))
    made: list[int] = []
    lazy = OnDemand(3, lambda i: made.append(i) or i)
    assert (lazy[-1], made) == (2, [2])
    assert list(lazy[:2]) == [0, 1]
    with pytest.raises(TypeError, match="a dict to look at"):
        from_visuals("what is heard ?", [{"array": [], "sampling_rate": 16000}])
