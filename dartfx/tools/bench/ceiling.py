"""What a pruned prefill can reach at best: a plain model that is as short behind the cut.

Its layers behind the cut take the first tokens of the prompt, a slice, so that nothing is selected
and nothing gathered.  Its answers mean nothing; its time is that of the matrix products and of the
attention that a cut leaves, at the rate that this machine reaches at their sizes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dartfx.tools.bench.timing import twin

__all__ = ["shortened"]


class _OfFirstTokens(nn.Module):
    """A decoder layer that computes the first tokens only."""

    def __init__(self, layer: nn.Module, tokens: int) -> None:
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def forward(self, hidden: Any, **given: Any) -> Any:
        left = slice(self.tokens)
        if (mask := given.get("attention_mask")) is not None:
            given["attention_mask"] = mask[..., left, left]
        if (positions := given.get("position_ids")) is not None:
            given["position_ids"] = positions[:, left]
        if (pair := given.get("position_embeddings")) is not None:
            given["position_embeddings"] = tuple(each[:, left] for each in pair)
        return self.layer(hidden[:, left], **given)


def shortened(model: nn.Module, first: int, tokens: int) -> nn.Module:
    """A copy of a transformers model, with its weights, of ``tokens`` from layer ``first`` on."""
    made: Any = twin(model)
    layers = made.get_decoder().layers
    for n in range(first, len(layers)):
        layers[n] = _OfFirstTokens(layers[n], tokens)
    short: nn.Module = made
    return short
