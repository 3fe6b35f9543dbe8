"""Inputs and outputs: embeddings, hidden states, attention, dtypes, losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family, Inputs
from tests.support.families import (
    ALL,
    MAIN,
    assert_same_generate,
    compiled,
    embedded,
    family,
    fresh,
    generate,
    pinned,
    pruned_reports,
    tower_outside,
)
from tests.support.slow import slow
from tests.support.tolerances import CLOSE, RETAIN, TOLERANCES

# --- what goes in and what comes out --------------------------------------------------------


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
def test_hidden_states_shrink_at_the_cut_in_inference_mode(name: str) -> None:
    built = fresh(name)
    tower_outside(built.model)
    inputs = built.make_inputs()
    oracle = hooked.pruned_forward(built.model, inputs, retain=RETAIN)
    with pinned(built, inputs, oracle.keep_idx):
        theirs = built.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    with compiled(built.model) as model, torch.inference_mode():
        ours = model(**inputs, use_cache=False, output_hidden_states=True)
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(ours.logits.clone(), oracle.logits, **CLOSE)
    for mine, other in zip(ours.hidden_states, theirs, strict=True):
        torch.testing.assert_close(mine.clone(), other, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_eager_attention(name: str) -> None:
    built = family(name, "eager")
    assert_same_generate(built, built.make_inputs("pad2"), steps=1)


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
        built.model, inputs, retain=RETAIN, max_new_tokens=1, kv_layout="layered"
    )
    with compiled(built.model, kv_layout="layered") as model:
        logits = generate(model, inputs, 1)
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(logits, oracle.logits, **TOLERANCES[torch.bfloat16])


# --- gradients ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "variant"),
    [("llava", "pad2"), *slow(("llava", "one"), ("internvl", "one"), ("internvl", "pad2"))],
)
def test_a_loss_takes_the_labels_of_the_kept_tokens(name: str, variant: str) -> None:
    inputs, labels, expected = with_labels(family(name), variant)
    with compiled(family(name).model) as model:
        loss = model(**inputs, labels=labels, use_cache=False).loss
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(loss, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl")])
def test_a_loss_in_a_later_graph_is_refused(name: str) -> None:
    """A graph break around the tower, as Qwen2.5-VL's: labels and keep_idx meet in no graph."""
    built = fresh(name)
    inputs, labels, expected = with_labels(built, "one")
    eager = built.model(**inputs, labels=labels, use_cache=False).loss
    tower_outside(built.model)
    if name == "llava":
        tower = built.model.model.vision_tower
        tower.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with (
        compiled(built.model, on_unsupported="warn") as model,
        pytest.warns(dartfx.PruningWarning, match=r"(?s)after.*batch_size"),
    ):
        loss = model(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, eager)
    assert not pruned_reports()
    # The advice: embeddings that the caller merged leave the tower, and its breaks, outside.
    torch.compiler.reset()
    embeds, mask = embedded(built, inputs)
    given = {"inputs_embeds": embeds.detach(), "labels": labels}
    if name == "qwen2_5_vl":
        given["position_ids"], _ = built.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
    with compiled(built.model) as model, dartfx.vision_tokens(mask):
        loss = model(**given, attention_mask=inputs["attention_mask"], use_cache=False).loss
    assert len(pruned_reports()) == 1
    torch.testing.assert_close(loss, expected, **CLOSE)
