"""Requests for vLLM, and the answers of transformers models pruned by hooks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dartfx.tools.zoo.hooked import SelectionInputs, pruned_generate, unpruned_generate
from dartfx.tools.zoo.oracle import select_batch

EXAMPLES = Path(__file__).parents[3] / "examples"
HELD_OUT = EXAMPLES / "tiny_vlm" / "heldout"
MODEL = EXAMPLES / "tiny_vlm" / "model"
RETAIN = 64


def make_requests() -> list[Any]:
    """[prompt, pictures, tokens]: of several lengths, with none, one and two pictures."""
    lines = (HELD_OUT / "questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][:: len(lines) // 9][:9]
    made: list[Any] = []
    for number, row in enumerate(rows):
        pictures = [str(HELD_OUT / row["image"])] * (2 if number == 4 else 1)
        words = "<image> " * len(pictures) + row["question"]
        made.append([words, pictures, 5 + number * 3 % 8])
        if number % 3 == 1:
            made.append([row["question"], [], 6])
    return made


RANK, SCALE = 4, 2.0


def write_adapter(folder: Path, seed: int) -> Path:
    """A random LoRA adapter of the decoder, as PEFT saves one."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": int(RANK * SCALE),
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made, weights = torch.Generator().manual_seed(seed), {}
    for name, weight in _loaded()[0].get_decoder().named_parameters():
        if name.removesuffix(".weight").endswith(tuple(config["target_modules"])):  # type: ignore[arg-type]
            path = f"base_model.model.model.language_model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            weights[f"{path}.lora_A.weight"] = torch.randn(RANK, columns, generator=made) * 0.1
            weights[f"{path}.lora_B.weight"] = torch.randn(rows, RANK, generator=made) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@functools.cache
def _loaded(adapter: str | None = None) -> tuple[Any, Any]:
    """The model, with an adapter merged into its weights, and the processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    if adapter is not None:
        weights = load_file(Path(adapter) / "adapter_model.safetensors")
        for name, up in weights.items():
            if ".lora_B." in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                down = weights[name.replace("lora_B", "lora_A")]
                with torch.no_grad():
                    model.get_submodule(path).weight += SCALE * up @ down
    return model, AutoProcessor.from_pretrained(MODEL)


def oracle(request: Any, retain: int | None, text_pivots: int = 4) -> list[int]:
    """Greedy tokens of transformers for one request, pruned by hooks or, for None, unpruned."""
    wanted: list[int] = oracle_logits(request, retain, text_pivots).argmax(-1).tolist()
    return wanted


@torch.no_grad()
def oracle_logits(
    request: Any, retain: int | None, text_pivots: int = 4, evenly: bool = False
) -> torch.Tensor:
    """[tokens, vocabulary] logits of the same; evenly: kept by position, as selector "uniform"."""

    def select(seen: SelectionInputs, retain: int) -> torch.Tensor:
        if evenly:
            vision = seen.vision[0].nonzero()[:, 0]
            bins = (torch.arange(retain, dtype=torch.float64) + 0.5) * len(vision) / retain
            kept = ~seen.vision[0]
            kept[vision[bins.ceil().long() - 1]] = True
            return kept.nonzero()[:, 0][None]
        masks = seen.vision, retain, seen.valid
        return torch.tensor(
            select_batch(seen.hidden, seen.keys, *masks, p_txt=text_pivots).keep_idx
        )

    prompt, pictures, tokens, *adapter = request
    model, processor = _loaded(*adapter)
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    if not images:
        inputs = processor.tokenizer(prompt, return_tensors="pt")
    else:
        inputs = processor(images=images, text=prompt, return_tensors="pt")
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    if not images or retain is None:
        made = unpruned_generate(model, inputs, max_new_tokens=tokens)
    else:
        how: Any = {"max_new_tokens": tokens, "kv_layout": "layered", "selector": select}
        made = pruned_generate(model, inputs, retain=retain, **how)
    return made.logits[0]
