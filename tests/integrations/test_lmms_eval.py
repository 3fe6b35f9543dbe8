"""The plugin inside lmms-eval: registry, requests and evaluator, on the small model.

Skipped where lmms-eval is not installed; docs/lmms_eval.md says how to run it.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

# Its own warnings are not ours to judge.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

HELD_OUT = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "heldout"
MODEL = HELD_OUT.parent / "model"
ARGUMENTS = f"pretrained={MODEL},retain_tokens=64,lowering=eager"
DOCUMENTS = 6

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.picture
doc_to_text: question
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
GENERATE = """\
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
"""
CHOOSE = """\
doc_to_target: !function utils.target
doc_to_choice: !function utils.choices
process_docs: !function utils.of_one_digit
"""
UTILS = f"""\
from pathlib import Path

from PIL import Image


def picture(doc):
    return [Image.open(Path({str(HELD_OUT)!r}) / doc["image"])]


def target(doc):
    return int(doc["answer"])


def choices(doc):
    return list("0123456789")


def of_one_digit(documents):
    return documents.filter(lambda doc: doc["type"] == "location")
"""


def test_the_entry_point_names_classes_of_the_module() -> None:
    (entry,) = entry_points(group="lmms_eval.models", name="dartfx")
    assert entry.value == "dartfx.integrations:lmms_eval_manifest"


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = HELD_OUT / "questions.jsonl"
    kinds = [("digits", "generate_until", "exact_match", GENERATE)]
    kinds += [("choices", "multiple_choice", "acc", CHOOSE)]
    for name, kind, metric, more in kinds:
        text = TASK.format(name=name, kind=kind, metric=metric, questions=questions) + more
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "utils.py").write_text(UTILS)
    return tmp_path


def evaluate(evaluator: Any, tasks: Path, task: str, **how: Any) -> dict[str, Any]:
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), model_name="dartfx")
    given = {"model_args": ARGUMENTS, "batch_size": DOCUMENTS, "limit": DOCUMENTS} | how
    results: dict[str, Any] = evaluator.simple_evaluate(
        model="dartfx", tasks=[task], task_manager=manager, log_samples=True, **given
    )
    return results


def pruned_answers(chosen: list[Any]) -> list[str]:
    """The answers in dartfx's own measure, one prompt at a time and without lmms-eval."""
    from dartfx.integrations.hf import load_model
    from dartfx.tools.evaluate import questions
    from dartfx.tools.evaluate.answers import Setting, answer_pruned

    model, processor = load_model(str(MODEL))
    prompts = questions.batches(chosen, processor, 1)
    setting = Setting(2, "dart", 64)
    (found,) = answer_pruned(model, processor, prompts, 8, setting)
    return list(found.texts)


def test_the_registry_resolves_both_kinds(lmms_eval: Any) -> None:
    from lmms_eval import models
    from lmms_eval.api.registry import get_model

    from dartfx.integrations.lmms_eval import Dartfx, DartfxSimple

    assert "dartfx" in models.list_available_models()
    assert models.get_model("dartfx") is get_model("dartfx") is Dartfx
    assert models.get_model("dartfx", force_simple=True) is DartfxSimple


@pytest.mark.parametrize("force_simple", [False, True])
def test_the_evaluator_gets_pruned_answers(lmms_eval: Any, tasks: Path, force_simple: bool) -> None:
    from dartfx.tools.evaluate import questions

    chosen = questions.load(HELD_OUT / "questions.jsonl")[:DOCUMENTS]
    expected = pruned_answers(chosen)
    results = evaluate(lmms_eval, tasks, "digits", force_simple=force_simple)
    samples = sorted(results["samples"]["digits"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0].strip() for sample in samples] == expected
    right = sum(q.answer == text for q, text in zip(chosen, expected, strict=True))
    assert results["results"]["digits"]["exact_match,none"] == right / DOCUMENTS
    assert results["throughput"]["avg_prompts_pruned"] == DOCUMENTS
    assert 64 < results["throughput"]["avg_sequence_tokens_kept"] < 80
    json.dumps(results["config"], default=str)


def test_multiple_choice_takes_the_likeliest(lmms_eval: Any, tasks: Path) -> None:
    from dartfx.tools.evaluate import questions

    chosen = questions.load(HELD_OUT / "questions.jsonl")
    chosen = [q for q in chosen if q.type == "location"][:3]
    results = evaluate(lmms_eval, tasks, "choices", limit=3, batch_size=10, force_simple=True)
    right = [q.answer == a for q, a in zip(chosen, pruned_answers(chosen), strict=True)]
    # Each digit is one token, so the likeliest choice is what greedy decoding begins with.
    assert results["results"]["choices"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert results["throughput"]["avg_prompts_pruned"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("retain_token=4", "retain_tokens"),
        ("batch_size=auto", "batch_size is 'auto'"),
        ("prune=False,retain_tokens=4", "no use for retain_tokens"),
        ("inductor={max_autotune}", "no JSON"),
    ],
)
def test_arguments_are_checked(lmms_eval: Any, arguments: str, message: str) -> None:
    from lmms_eval.models import get_model

    from dartfx.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        get_model("dartfx").create_from_arg_string(f"pretrained={MODEL},{arguments}")


def test_what_is_not_offered(lmms_eval: Any) -> None:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models import get_model

    from dartfx.integrations.lmms_eval import Dartfx

    assert get_model("dartfx") is Dartfx
    model = Dartfx(str(MODEL), prune=False)
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    model.task_dict = {"sounds": {"test": [None]}}
    content = [{"type": "audio", "url": "a.wav"}, {"type": "text", "text": "what ?"}]
    given = ("what ?", lambda doc: [{"role": "user", "content": content}], {}, 0, "sounds", "test")
    metadata = {"task": "sounds", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", given, 0, metadata)
    with pytest.raises(TypeError, match="sounds has audio"):
        model.generate_until([request])
