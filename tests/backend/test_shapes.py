"""Every shape users send: paddings, ragged rows, many images, videos, sizes, dtypes, gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dartfx
from dartfx.passes.outcome import Pruned
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo import hooks as hooks_of
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN, TOLERANCES

MAIN = ["llava", *slow("qwen2_5_vl", "internvl")]
ALL = [*MAIN, *slow("qwen3_vl")]  # only generate makes one graph of Qwen3-VL's DeepStack


def fresh(name: str, attention: str = "sdpa") -> Family:
    """One layer after the cut; DeepStack, which writes after the third layer, needs another."""
    layers = 4 if name == "qwen3_vl" else 3
    return load(name, layers=layers, attn_implementation=attention)


family = functools.cache(fresh)


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
    built: Family, inputs: Inputs, layout: Any = "auto", **where: Any
) -> Tensor:
    """Two generated tokens equal the hooks'.  Returns their logits [B, 2, V]."""
    exact = "uniform" if layout == "auto" else layout
    oracle = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=2, kv_layout=exact, **where
    )
    with compiled(built.model, kv_layout=layout) as model:
        logits = generate(model, inputs)
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)
    return logits


# --- batches and padding --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_four(name: str) -> None:
    """One row is what ``test_families.py`` tries of every family."""
    assert_same_generate(family(name), family(name).make_inputs("pad4"))


@pytest.mark.parametrize("name", MAIN)
def test_padding_on_the_right(name: str) -> None:
    assert_same_forward(family(name), padded_right(family(name).make_inputs("pad4")))


@pytest.mark.parametrize("name", MAIN)
def test_a_batch_without_a_mask(name: str) -> None:
    built = family(name)
    one = built.make_inputs()
    batch = {k: torch.cat([v, v]) for k, v in without_mask(one).items()}
    batch["input_ids"][1, 0] += 1
    assert_same_forward(built, batch)


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_the_same_alone_padded_and_batched(name: str) -> None:
    built = family(name)
    batch = built.make_inputs("pad2")
    together = assert_same_generate(built, batch)
    torch.compiler.reset()
    dartfx.reset()
    # Row 1 is the one with pads.  Alone, "auto" would be layered: decode then sees all tokens in
    # the first two layers.
    alone = assert_same_generate(built, built.row(batch, 1), "uniform")
    torch.testing.assert_close(together[1:], alone, **CLOSE)


def with_a_row_of_text(built: Family) -> Inputs:
    """Row 0 with two images, row 1 with none."""
    inputs = built.make_inputs("two")
    text = torch.full_like(inputs["input_ids"], built.text_ids.start)
    text[0, ::2] += 1
    added = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if built.structure.types:
        added[built.structure.types] = torch.zeros_like(text, dtype=torch.int)
    return inputs | {k: torch.cat([inputs[k], v]) for k, v in added.items()}


@pytest.mark.parametrize("name", MAIN)
def test_rows_with_different_numbers_of_images(name: str) -> None:
    inputs = family(name).make_inputs("ragged")
    assert_same_forward(family(name), inputs)
    dartfx.reset()
    assert_same_generate(family(name), inputs)


@pytest.mark.parametrize("name", MAIN)
def test_a_row_without_images_fails_naming_it(name: str) -> None:
    """Its text is as long as the longest row, so there is no padding to give way."""
    with (
        compiled(family(name).model) as model,
        pytest.raises(dartfx.SelectionError, match="row 1"),
    ):
        model(**with_a_row_of_text(family(name)), use_cache=False)


# --- images and videos ----------------------------------------------------------------------


def many_images(built: Family, count: int, gap: int = 3, after: int = 6) -> Inputs:
    """One row: ``count`` images with text between."""
    parts = built.structure
    ids = [*range(2, 7)]
    for number in range(count):
        ids += [*parts.image_prefix, *[parts.image_token_id] * parts.tokens_per_image]
        ids += [*parts.image_suffix, *range(10 + number, 10 + number + gap)]
    ids += [*range(30, 30 + after)]
    inputs: Inputs = {"input_ids": torch.tensor([ids])}
    if parts.types:
        inputs[parts.types] = (inputs["input_ids"] == parts.image_token_id).int()
    return inputs | parts.pixels(count, torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", ALL)
def test_three_images_with_text_between(name: str) -> None:
    assert_same_generate(family(name), many_images(family(name), 3))


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


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("qwen3_vl")])
def test_a_video_of_qwen(name: str) -> None:
    built = family(name)
    # Qwen3-VL writes timestamps between frames, so each frame is a grid of its own there.
    inputs = qwen_prompt(built, (3 if name == "qwen2_5_vl" else 1, 4, 8), video=True)
    assert_same_generate(built, inputs, image_token_id=built.model.config.video_token_id)


def test_a_video_of_the_llava_line() -> None:
    built = family("llava_next_video")
    assert_same_generate(built, built.make_inputs(), image_token_id=built.image_token_id)


GRIDS = [(1, 4 + 2 * (i % 4), 8 + 2 * (i % 3)) for i in range(10)]


def ten_prompts(built: Family) -> list[Inputs]:
    """Different prompt lengths, and images of different sizes where the model takes those."""
    if built.structure.types:
        return [qwen_prompt(built, grid, 5 + 2 * i) for i, grid in enumerate(GRIDS)]
    tiles = [1 + i % 3 for i in range(10)] if built.name == "internvl" else [1] * 10
    return [many_images(built, n, after=4 + 3 * i) for i, n in enumerate(tiles)]


@pytest.mark.parametrize("name", ALL)
def test_ten_sizes_take_at_most_three_compilations(name: str) -> None:
    built = family(name)
    prompts = ten_prompts(built)
    where: Any = {"retain": RETAIN, "max_new_tokens": 2, "kv_layout": "uniform"}
    oracles = [hooked.pruned_generate(built.model, inputs, **where) for inputs in prompts]
    with compiled(built.model) as model:
        for inputs, oracle in zip(prompts, oracles, strict=True):
            torch.testing.assert_close(generate(model, inputs), oracle.logits, **CLOSE)
    assert 1 <= len(pruned_reports()) <= 3


# --- what goes in and what comes out --------------------------------------------------------


def embedded(built: Family, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The prompt as embeddings [B, S, D] that the caller merged, and its vision mask."""
    mask = inputs["input_ids"] == built.image_token_id
    vision = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    features = built.model.get_image_features(**vision).pooler_output
    embeds = built.model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[mask] = torch.cat(list(features), 0).reshape(-1, embeds.shape[-1])
    return embeds, mask


@pytest.mark.parametrize("name", MAIN)
def test_embeddings_that_the_caller_merged(name: str) -> None:
    built = family(name)
    inputs = built.make_inputs()
    embeds, mask = embedded(built, inputs)
    rest = {"attention_mask": inputs["attention_mask"], "use_cache": False}
    if name == "qwen2_5_vl":  # M-RoPE positions come from the token ids, so from the caller here
        types = inputs["mm_token_type_ids"]
        ids, grid = inputs["input_ids"], inputs["image_grid_thw"]
        rest["position_ids"], _ = built.model.model.get_rope_index(ids, types, grid)
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with compiled(built.model) as model, dartfx.vision_tokens(mask), torch.no_grad():
        logits = model(inputs_embeds=embeds, **rest).logits
    torch.testing.assert_close(logits, oracle.logits, **CLOSE)


@pytest.mark.parametrize("name", MAIN)
def test_hidden_states_shrink_at_the_cut(name: str) -> None:
    built = family(name)
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with pinned(built, inputs, oracle.keep_idx):
        theirs = built.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    with compiled(built.model) as model:
        ours = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert pruned_reports()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_eager_attention(name: str) -> None:
    built = family(name, "eager")
    assert_same_generate(built, built.make_inputs("pad2"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
def test_flex_attention_is_refused() -> None:
    """Its block mask is a function of positions, which no gather can shorten."""
    built = family("llava", "flex_attention")
    with (
        compiled(built.model) as model,
        torch.no_grad(),
        pytest.raises(dartfx.UnsupportedGraphError, match="no attention that is recognised"),
    ):
        model(**built.make_inputs(), use_cache=False)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str) -> None:
    built = fresh(name)
    built.model.to(torch.bfloat16)
    inputs = built.make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    oracle = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=2, kv_layout="layered"
    )
    with compiled(built.model, kv_layout="layered") as model:
        logits = generate(model, inputs)
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(logits, oracle.logits, **TOLERANCES[torch.bfloat16])


# --- gradients ------------------------------------------------------------------------------


@contextmanager
def pinned(built: Family, inputs: Inputs, keep_idx: Tensor) -> Iterator[None]:
    """The eager model pruned by hooks to ``keep_idx`` [B, S'], with gradients on."""
    hooks = hooks_of.Hooks(built.model, inputs, 2, RETAIN, lambda *_: keep_idx)
    # Without a cache nothing is stored, and a selection that is given needs no keys.
    hooks.stored[1] = (keep_idx, keep_idx)
    with hooks_of.installed(hooks, "layered"), torch.enable_grad():
        yield


@pytest.mark.parametrize("name", MAIN)
def test_in_inference_mode(name: str) -> None:
    built = family(name)
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with compiled(built.model) as model, torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(logits.clone(), oracle.logits, **CLOSE)


# Dynamo looks at .grad of every input, of those that are no leaves too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", MAIN)
def test_gradients_equal_those_of_the_hooks(name: str) -> None:
    """They reach the vision tower and every parameter of the decoder as through the kept tokens."""
    built = fresh(name)
    inputs = built.make_inputs()
    keep_idx = hooked.pruned_forward(built.model, inputs, retain=RETAIN).keep_idx
    built.model.requires_grad_(True)

    def gradients() -> dict[str, Tensor]:
        built.model.zero_grad(set_to_none=True)
        built.model(**inputs, use_cache=False).logits.square().mean().backward()
        return {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}

    with pinned(built, inputs, keep_idx):
        theirs = gradients()
    with compiled(built.model):
        ours = gradients()
    assert pruned_reports()
    assert ours.keys() == theirs.keys()
    assert any("vis" in n and g.abs().sum() > 0 for n, g in ours.items())
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")


def test_no_gradient_from_after_the_cut_reaches_a_dropped_token() -> None:
    """Before the cut a dropped token acts through its keys and values; its own stream ends."""
    built = fresh("llava")
    inputs = built.make_inputs()
    keep_idx = hooked.pruned_forward(built.model, inputs, retain=RETAIN).keep_idx
    size = built.model.config.text_config.hidden_size
    stream = torch.zeros(1, inputs["input_ids"].shape[1], size, requires_grad=True)
    before_the_cut = built.decoder.layers[1]
    before_the_cut.register_forward_hook(lambda _, __, output: output + stream)
    with compiled(built.model) as model:
        model(**inputs, use_cache=False).logits.square().mean().backward()
    assert pruned_reports()
    reached = stream.grad.abs().sum(-1)[0] > 0
    assert reached.nonzero().flatten().tolist() == keep_idx[0].tolist()


def with_labels(built: Family, variant: str) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs, labels [B, S] of the text, and the loss that pruning by hooks gives."""
    inputs = built.make_inputs(variant)
    ids = inputs["input_ids"]
    hidden = (ids == built.image_token_id) | (inputs["attention_mask"] == 0)
    labels = ids.masked_fill(hidden, -100)
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    kept = following.gather(1, oracle.keep_idx)
    return inputs, labels, cross_entropy(oracle.logits.flatten(0, 1), kept.flatten())


@pytest.mark.parametrize("name", ["llava", "internvl"])
@pytest.mark.parametrize("variant", ["one", "pad2"])
def test_a_loss_takes_the_labels_of_the_kept_tokens(name: str, variant: str) -> None:
    inputs, labels, expected = with_labels(family(name), variant)
    with compiled(family(name).model) as model:
        loss = model(**inputs, labels=labels, use_cache=False).loss
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_a_loss_in_a_later_graph_is_refused() -> None:
    """Dynamo breaks inside Qwen2.5-VL's tower, so labels and keep_idx meet in no graph."""
    built = family("qwen2_5_vl")
    inputs, labels, expected = with_labels(built, "one")
    eager = built.model(**inputs, labels=labels, use_cache=False).loss
    with (
        compiled(built.model, on_unsupported="warn") as model,
        pytest.warns(dartfx.PruningWarning, match=r"(?s)after.*batch_size"),
    ):
        loss = model(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, eager)
    assert not pruned_reports()
    # The advice: embeddings that the caller merged leave the tower, and its breaks, outside.
    embeds, mask = embedded(built, inputs)
    positions, _ = built.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    given = {"inputs_embeds": embeds.detach(), "position_ids": positions, "labels": labels}
    with compiled(built.model) as model, dartfx.vision_tokens(mask):
        loss = model(**given, attention_mask=inputs["attention_mask"], use_cache=False).loss
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(loss, expected, **CLOSE)
