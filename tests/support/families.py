"""The tiny families compiled and compared with the hooks: one layer behind the cut, or two."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN

MAIN = ["llava", *slow("qwen2_5_vl", "internvl")]
ALL = [*MAIN, *slow("qwen3_vl")]  # only generate makes one graph of Qwen3-VL's DeepStack
NAMES = ["llava", "qwen2_5_vl", "internvl", "qwen3_vl"]

# Families and prompts for what concerns selection only: ragged and padded batches, tiles.
PROMPTS = [
    ("llava", "ragged"),
    ("qwen2_5_vl", "pad2"),
    *slow(("llava", "one"), ("gemma3", "one"), ("qwen3_vl", "pad2"), ("llava_next", "pad4")),
]


def fresh(name: str, attention: str = "sdpa") -> Family:
    """One layer after the cut; DeepStack, which writes after the third layer, needs another."""
    layers = 4 if name == "qwen3_vl" else 3
    return load(name, layers=layers, attn_implementation=attention)


family = functools.cache(fresh)


def called(name: str) -> Family:
    """After a first call, in which transformers sets up hooks that would break the graph."""
    built = load(name, layers=3)
    built.model(**built.make_inputs())
    return built


def tower_outside(model: Any) -> Any:
    """A Qwen2.5 with its towers left out of the graphs, as docs/benchmarks.md advises; in place.

    They break into twenty graphs, three quarters of what a forward takes to compile, before
    anything is merged.  Merge and decoder still are in several.  Whole forwards are in
    test_parity.py and test_shapes.py, and with gradients in test_inputs_and_outputs.py.  Other
    models stay as they are.
    """
    if model.config.model_type in ("qwen2_5_vl", "qwen2_5_omni_thinker"):
        base = model.base_model
        for name in ("get_image_features", "get_video_features", "get_audio_features"):
            if hasattr(base, name):
                setattr(base, name, torch.compiler.disable(getattr(base, name)))
    return model


BARE: dict[str, Any] = {"retain_tokens": RETAIN, "lowering": "eager"}


def bare(built: Family, *, fullgraph: bool = True, **options: Any) -> Any:
    """A bare torch.compile: in one graph unless said otherwise, since breaks only cost time."""
    settings = {**BARE, **options}
    return torch.compile(built.model, backend="dart", fullgraph=fullgraph, options=settings)


@contextmanager
def compiled(model: Any, **options: Any) -> Iterator[Any]:
    settings = {"retain_tokens": RETAIN, "lowering": "eager", "on_unsupported": "error", **options}
    try:
        yield dartfx.compile(model, **settings)
    finally:
        model._compiled_call_impl = None


def pruned_reports() -> list[Pruned]:
    return [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]


def generate(model: Any, inputs: Inputs, steps: int = 2) -> Tensor:
    """Logits [B, steps, V] of a greedy generation."""
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, 1)


def without_mask(inputs: Inputs) -> Inputs:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def padded_right(inputs: Inputs) -> Inputs:
    """A left-padded batch with its pads moved behind the text."""
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    moved = dict(inputs)
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            rows = zip(value, pads, strict=True)
            moved[name] = torch.stack([row.roll(-n) for row, n in rows])
    return moved


def assert_same_forward(built: Family, inputs: Inputs, **where: Any) -> hooked.Pruned:
    """A forward without cache equals the hooks, at every kept token that is no padding."""
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN, **where)
    with compiled(built.model) as model, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert len(pruned_reports()) == 1
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    kept = valid.gather(1, oracle.keep_idx)
    assert logits.shape == oracle.logits.shape
    torch.testing.assert_close(logits[kept], oracle.logits[kept], **CLOSE)
    return oracle


def assert_same_generate(
    built: Family, inputs: Inputs, layout: Any = "auto", steps: int = 2, **where: Any
) -> Tensor:
    """The generated tokens equal the hooks'.  Returns their logits [B, steps, V]."""
    exact = "uniform" if layout == "auto" else layout
    oracle = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=steps, kv_layout=exact, **where
    )
    with compiled(built.model, kv_layout=layout) as model:
        logits = generate(model, inputs, steps)
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)
    return logits


def embedded(built: Family, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The prompt as embeddings [B, S, D] that the caller merged, and its vision mask."""
    mask = inputs["input_ids"] == built.image_token_id
    vision = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    features = built.model.get_image_features(**vision).pooler_output
    embeds = built.model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[mask] = torch.cat(list(features), 0).reshape(-1, embeds.shape[-1])
    return embeds, mask


@contextmanager
def pinned(built: Family, inputs: Inputs, keep_idx: Tensor) -> Iterator[None]:
    """The eager model pruned by hooks to ``keep_idx`` [B, S'], with gradients on."""
    hooks = hooks_of.Hooks(built.model, inputs, 2, RETAIN, lambda *_: keep_idx)
    # Without a cache nothing is stored, and a selection that is given needs no keys.
    hooks.stored[1] = (keep_idx, keep_idx)
    with hooks_of.installed(hooks, "layered"), torch.enable_grad():
        yield


def qwen_prompt(
    built: Family, grid: tuple[int, int, int], after: int = 8, *, video: bool = False
) -> Inputs:
    """One image or video of ``grid`` (time, height, width in patches), text around it."""
    token = built.model.config.video_token_id if video else built.image_token_id
    tokens = grid[0] * grid[1] * grid[2] // 4
    start, end = built.structure.image_prefix, built.structure.image_suffix
    ids = torch.tensor([[*range(2, 7), *start, *[token] * tokens, *end, *range(20, 20 + after)]])
    patch = built.model.config.vision_config.patch_size
    values = 3 * 2 * patch * patch
    pixels = torch.randn(tokens * 4, values, generator=torch.Generator().manual_seed(3))
    names = (
        ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    )
    vision = dict(zip(names, (pixels, torch.tensor([grid])), strict=True))
    types = (ids == token).int() * (2 if video else 1)
    return {"input_ids": ids, "mm_token_type_ids": types, **vision}
