"""Models with only the backbone compiled, as needed by TRL's trainers and custom heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.registry import load
from tests.support.tolerances import CLOSE, RETAIN

OPTIONS: dict[str, Any] = {
    "retain_tokens": RETAIN,
    "lowering": "eager",
    "on_unsupported": "error",
    "logits": "full",
}
# TRL sets what transformers deprecated, and so do our versions of both.
TRL = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]


@torch.no_grad()
def test_hidden_states_at_the_prompts_length() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("ragged")
    right = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    dartfx.compile(built.model.model, **OPTIONS)
    logits = built.model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    at = right.keep_idx.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    torch.testing.assert_close(logits.gather(1, at), right.logits, **CLOSE)


@pytest.mark.slow
def test_generate_around_it() -> None:
    built = load("llava", layers=3)
    inputs = built.make_inputs("ragged")
    right = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=3, kv_layout="uniform"
    )
    dartfx.compile(built.model.model, **OPTIONS)
    found = built.model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(found.logits, 1), right.logits, **CLOSE)


def loaded(saved: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """A model, its processor, and two rows of a prompt and its answer."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    row = {
        "images": [Image.open(saved / "image.png").convert("RGB")],
        "prompt": [{"role": "user", "content": "what is shown?"}],
        "completion": [{"role": "assistant", "content": "noise it is"}],
    }
    model = AutoModelForImageTextToText.from_pretrained(saved)
    return model, AutoProcessor.from_pretrained(saved), [row, row]


ONCE = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1}


def trainer(saved: Path, folder: Path, model: Any, processor: Any, rows: Any) -> Any:
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=2, max_length=None, **ONCE
    )
    dataset = pytest.importorskip("datasets").Dataset.from_list(rows)
    return trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=processor)


class TestTrl:
    pytestmark = TRL

    def test_the_loss_and_gradients_are_those_of_the_pruned_model(
        self, saved: Path, tmp_path: Path
    ) -> None:
        model, processor, rows = loaded(saved)
        dartfx.compile(model.model, **OPTIONS)
        trained = trainer(saved, tmp_path, model, processor, rows)
        batch = next(iter(trained.get_train_dataloader()))
        wanted, norm = expected_step(loaded(saved)[0].train(), batch)
        trained.train()
        first = trained.state.log_history[0]
        assert any(report.pruned for report in dartfx.reports())
        torch.testing.assert_close(torch.tensor(first["loss"]), wanted, **CLOSE)
        torch.testing.assert_close(torch.tensor(first["grad_norm"]), norm, **CLOSE)

    def test_the_whole_model_is_refused_with_the_recipe(self, saved: Path, tmp_path: Path) -> None:
        model, processor, rows = loaded(saved)
        dartfx.compile(model, **OPTIONS)
        with pytest.raises(dartfx.UnsupportedGraphError, match=r"dartfx.compile\(model.base_model"):
            trainer(saved, tmp_path, model, processor, rows).train()

    def test_grpo_compiles_generate_and_training_once(self, saved: Path, tmp_path: Path) -> None:
        trl = pytest.importorskip("trl")
        model, processor, rows = loaded(saved)
        dartfx.compile(model.model, **OPTIONS)
        arguments = trl.GRPOConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=4, gradient_checkpointing=False, **ONCE,
        )  # fmt: skip
        prompts = [{"image": row["images"][0], "prompt": row["prompt"]} for row in rows]
        trained = trl.GRPOTrainer(
            model, lambda completions, **_: [float(n) for n in range(len(completions))], arguments,
            train_dataset=pytest.importorskip("datasets").Dataset.from_list(prompts),
            processing_class=processor,
        )  # fmt: skip
        trained.train()
        assert sum(report.pruned for report in dartfx.reports()) == 2


def expected_step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the norm of its gradients, of the model pruned by hooks."""
    labels = batch.pop("labels")
    hooks = hooks_of.Hooks(model, batch, 2, RETAIN, hooked.float64_selector)
    with hooks_of.installed(hooks, "uniform"), torch.enable_grad():
        logits = model(**batch, use_cache=True).logits
    assert hooks.keep_idx is not None
    following = pad(labels, (0, 1), value=-100)[:, 1:].gather(1, hooks.keep_idx)
    loss = cross_entropy(logits.flatten(0, 1), following.flatten())
    loss.backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return loss.detach(), torch.nn.utils.get_total_norm(grads)
