"""Training: Trainer, DistributedDataParallel, FSDP2, and alternating generate and training.

One process stands for all ranks of the process group: what is tried is what the wrappers make of
the model's forward, and that does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, pad
from torch.nn.parallel import DistributedDataParallel

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

# Accelerate collects garbage after each training.
pytestmark = pytest.mark.usefixtures("own_objects")

OPTIONS = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error"}


@pytest.fixture
def family() -> Family:
    built = load("llava", layers=3)
    built.model.requires_grad_(True)
    return built


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def labels(built: Family, inputs: dict[str, Any]) -> torch.Tensor:
    """[B, S]: the text tokens, as one trains on; vision tokens are no targets."""
    ids = inputs["input_ids"]
    return ids.masked_fill(ids == built.image_token_id, -100)


def step(built: Family, inputs: dict[str, Any], model: Any = None) -> torch.Tensor:
    """The loss of a training step, its gradients left in the model."""
    model = model or built.model
    loss = model(**inputs, labels=labels(built, inputs), use_cache=False).loss
    loss.backward()
    return loss.detach()


def expected_step(built: Family, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of the model pruned by hooks."""
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    following = pad(labels(built, inputs), (0, 1), value=-100)[:, 1:]
    return cross_entropy(
        oracle.logits.flatten(0, 1), following.gather(1, oracle.keep_idx).flatten()
    ).detach()


def assert_pruned() -> None:
    assert any(report.pruned for report in dartfx.reports())


@pytest.mark.parametrize("bf16", [True, *slow(False)])
def test_trainer(family: Family, tmp_path: Path, bf16: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    inputs = family.make_inputs("one")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted = expected_step(family, inputs).float()
    dartfx.compile(family.model, **OPTIONS)
    row = {name: value[0] for name, value in inputs.items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, bf16=bf16,
    )  # fmt: skip
    trainer = transformers.Trainer(
        family.model, arguments, train_dataset=[row | {"labels": labels(family, inputs)[0]}]
    )
    torch.testing.assert_close(torch.tensor(trainer.train().training_loss), wanted, **CLOSE)
    assert_pruned()


def test_trainer_that_takes_the_loss_and_metrics_itself(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    inputs = family.make_inputs("one")
    targets = labels(family, inputs)
    oracle = hooked.pruned_forward(family.model, inputs, retain=RETAIN)
    smoother = transformers.trainer_pt_utils.LabelSmoother(0.1)
    kept = targets.gather(1, oracle.keep_idx)
    # Trainer counts shifted labels, but shifts them for the loss of text models only.
    items = (targets[:, 1:] != -100).sum()
    wanted = smoother({"logits": oracle.logits}, kept, num_items_in_batch=items).detach()
    dartfx.compile(family.model, **OPTIONS, logits="full")
    row = {name: value[0] for name, value in inputs.items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, learning_rate=0.0, label_smoothing_factor=0.1,
    )  # fmt: skip
    seen: list[tuple[Any, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
        return {"right": float(right.sum())}

    examples = [row | {"labels": targets[0]}]
    trainer = transformers.Trainer(
        family.model, arguments, train_dataset=examples, eval_dataset=examples,
        compute_metrics=metrics,
    )  # fmt: skip
    trainer.args.prediction_loss_only = False
    torch.testing.assert_close(torch.tensor(trainer.train().training_loss), wanted, **CLOSE)
    found = trainer.evaluate(ignore_keys=["past_key_values", "image_hidden_states"])
    right = (oracle.logits.argmax(-1)[:, :-1] == kept[:, 1:]).sum()
    assert found["eval_right"] == right
    assert seen == [(*targets.shape, oracle.logits.shape[-1])]
    assert_pruned()


@pytest.mark.parametrize("optimize", [True, *slow(False)])
def test_distributed_data_parallel(family: Family, group: None, optimize: bool) -> None:
    inputs = family.make_inputs("one")
    wanted = expected_step(family, inputs)
    dartfx.compile(family.model, **OPTIONS)
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        loss = step(family, inputs, DistributedDataParallel(family.model))
    torch.testing.assert_close(loss, wanted, **CLOSE)
    assert_pruned()


def test_fsdp2_of_the_whole_model(family: Family, group: None) -> None:
    inputs = family.make_inputs("one")
    wanted = expected_step(family, inputs)
    fully_shard(family.model, mesh=init_device_mesh("cpu", (1,)))
    dartfx.compile(family.model, **OPTIONS)
    torch.testing.assert_close(step(family, inputs), wanted, **CLOSE)
    assert_pruned()


def test_fsdp2_of_every_layer_is_refused_by_name(family: Family, group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in family.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(family.model, mesh=mesh)
    dartfx.compile(family.model, **OPTIONS)
    with pytest.raises(dartfx.UnsupportedGraphError, match="FSDP2"):
        step(family, family.make_inputs("one"))


def test_generate_and_training_in_turns(family: Family) -> None:
    """As GRPO does it: what is sampled without gradients is trained on, again and again."""
    inputs, reference = family.make_inputs("one"), load("llava", layers=3)
    dartfx.compile(family.model, **OPTIONS)
    for _ in range(2):
        with torch.no_grad():
            ids = family.model.generate(**inputs, max_new_tokens=2, do_sample=True)
        longer = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        reference.model.load_state_dict(family.model.state_dict())
        loss = step(family, longer)
        torch.testing.assert_close(loss, expected_step(reference, longer), **CLOSE)
        with torch.no_grad():
            for weight in family.model.parameters():
                if weight.grad is not None:
                    weight -= 0.01 * weight.grad
                    weight.grad = None
    reports = [r for r in dartfx.reports() if r.pruned]
    assert len(reports) == 2, "a prefill and a training step, each compiled once"
