"""Keep the tokens chosen by another method: the passes as a library, under torch.compile.

The method here ranks vision tokens by how much the last text token attends to them in decoder layer
K-1 (as FastV does), taken from an eager run.  Any method works that marks as many vision tokens as
are kept.  The passes do the rest, and know nothing of the model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dartfx import passes

IMAGE, LAYER, RETAIN = 31999, 2, 64


class KeepThese:
    """A torch.compile backend that keeps the vision tokens marked in ``kept`` [B, S] bool.

    outcomes: one per graph.
    """

    def __init__(self, kept: Tensor, layer: int) -> None:
        self.kept = kept
        self.outcomes: list[object] = []
        retain = int(kept.sum(1).max())
        self.request = passes.Request((passes.Stage(layer, lambda n: retain, passes.Given()),))

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            # The mask becomes the first input; ``Given`` selects the tokens it marks.
            rewritten = passes.normalise(module, extra=[self.kept])
        except passes.Refusal:
            return module.forward  # no tensor inputs, so no tokens
        outcome = passes.prune(rewritten, self.request)
        self.outcomes.append(outcome)
        if not isinstance(outcome, passes.Pruned):
            return module.forward  # for example a decode step
        return lambda *args: rewritten(self.kept, *args)


def most_attended(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, S] bool: the vision tokens most attended by the last position before layer K."""
    model.set_attn_implementation("eager")  # fused attention returns no weights
    output = model(**inputs, output_attentions=True)
    model.set_attn_implementation("sdpa")
    vision = inputs["input_ids"] == IMAGE
    weights = output.attentions[LAYER - 1].mean(1)[:, -1].masked_fill(~vision, -1)
    kept = torch.zeros_like(vision)
    return kept.scatter(1, weights.topk(RETAIN).indices, True)


def model_and_inputs() -> tuple[Any, dict[str, Tensor]]:
    """A small LLaVA with random weights, and a prompt with one image of 144 tokens."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=48, patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=512,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, image_seq_length=144
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(1, 31000, (1, 5 + 144 + 12))
    ids[:, 5 : 5 + 144] = IMAGE
    pixels = torch.randn(1, 3, 48, 48)
    return model, {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def main() -> tuple[passes.Pruned, Tensor, Tensor]:
    """Run the example; returns the outcome, the mask [1, S] and the pruned logits [1, S', V]."""
    model, inputs = model_and_inputs()
    kept = most_attended(model, inputs)
    backend = KeepThese(kept, LAYER)
    logits = torch.compile(model, backend=backend, dynamic=False)(**inputs).logits
    (pruned,) = (o for o in backend.outcomes if isinstance(o, passes.Pruned))
    before, after = pruned.sequence
    print(f"{before} -> {after} tokens before decoder layer {pruned.layer}: {RETAIN} most attended")
    print(f"decoder FLOPs: {pruned.flops[0]:.3g} -> {pruned.flops[1]:.3g}")
    return pruned, kept, logits


if __name__ == "__main__":
    main()
