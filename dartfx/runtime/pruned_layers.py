"""Cache layers that lack tokens which pruning dropped, and say so to transformers.

transformers asks a cache layer how many tokens it has seen, from which positions and what is still
to be computed follow, and how many columns it holds and where they begin, from which masks follow.
Its sliding windows answer the two differently, and so do these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = ["KeptColumns", "PrunedLayer", "make_pruned"]


@dataclass(frozen=True)
class KeptColumns:
    """Which tokens of a prompt the first columns of a cache hold.

    prompt: how many tokens it had; keep_idx: [B, S'] int64, positions in it, ascending; valid:
    [B, S'] bool, false at pads, None where the prompt came without a mask.
    """

    prompt: int
    keep_idx: Tensor
    valid: Tensor | None

    def rows(self, index: Tensor) -> KeptColumns:
        """The same for these rows of the batch."""
        index = index.to(self.keep_idx.device)
        valid = None if self.valid is None else self.valid[index]
        return KeptColumns(self.prompt, self.keep_idx[index], valid)

    def without_last(self, tokens: int) -> KeptColumns:
        """The same without the prompt's last tokens.

        Raises SelectionError where pruning dropped some of those.
        """
        length, keep_idx = self.prompt - tokens, self.keep_idx
        left = keep_idx.shape[1] - tokens
        tail = torch.arange(length, self.prompt, device=keep_idx.device)
        if left < 0 or not bool((keep_idx[:, left:] == tail).all()):
            raise SelectionError(
                f"the KV cache cannot be cropped by the last {tokens} tokens of its prompt: some "
                "were dropped by pruning; crop less, or compute the prompt again"
            )
        valid = None if self.valid is None else self.valid[:, :left]
        return KeptColumns(length, keep_idx[:, :left], valid)


class PrunedLayer:
    """Mixin in front of a transformers cache layer, whose keys lack ``dropped`` tokens per row.

    kept: of which tokens its first columns are; None where one mask cannot fit all layers.
    masks_fit: whether whoever calls the model gathers masks as the columns were.
    """

    keys: Any
    values: Any
    dropped = 0
    kept: KeptColumns | None = None
    masks_fit = False

    def get_seq_length(self) -> Any:
        """How many tokens the layer has seen: an int, or a tensor of a static layer."""
        return self._held() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns attention gets, and which token's the first one counts as."""
        self._check_pads()
        return self._held() + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: a negative number of them, or a positive number to be left."""
        super().crop(-self._cropped(tokens_to_remove))  # type: ignore[misc]
        if self.keys is not None:
            # Views of another stride each time would be compiled for, one by one.
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def _cropped(self, tokens_to_remove: int) -> int:
        """How many tokens a crop removes, after it has been checked and kept columns forgotten."""
        seen = int(self.get_seq_length())
        left = min(tokens_to_remove, seen) if tokens_to_remove > 0 else seen + tokens_to_remove
        if self.kept is not None and left < self.kept.prompt:
            self.kept = self.kept.without_last(self.kept.prompt - left)
        return seen - left

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self.dropped, self.kept = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.kept = self.kept and self.kept.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.kept = self.kept and self.kept.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.kept is not None:
            rows = torch.arange(self.kept.keep_idx.shape[0]).repeat_interleave(repeats)
            self.kept = self.kept.rows(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so it is made again from its base where it is loaded.
        return _restored, (type(self).__bases__[1], self.__dict__)

    def _held(self) -> Any:
        return super().get_seq_length()  # type: ignore[misc]

    def _check_pads(self) -> None:
        """Raise SelectionError where pads would be attended, since no mask hides them."""
        if self.masks_fit or self.kept is None or self.kept.valid is None:
            return
        if not bool(self.kept.valid.all()):
            raise SelectionError(
                "this KV cache was pruned in a batch with pads, and only a model compiled by "
                "dartfx.compile fits attention masks to its columns; call such a model, or prune "
                "rows without pads"
            )


class _PrunedSliding(PrunedLayer):
    """A sliding window counts the tokens that it has seen by itself, dropped ones included."""

    cumulative_length: int
    sliding_window: int

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._check_pads()
        visible = 0
        if isinstance(self.keys, Tensor) and self.keys.ndim == 4:
            visible = min(self.keys.shape[-2], self.sliding_window - 1)
        return visible + query_length, self.cumulative_length - visible

    def crop(self, tokens_to_remove: int) -> None:
        count = self._cropped(tokens_to_remove)
        left = self.cumulative_length - count
        super(PrunedLayer, self).crop(-count)  # type: ignore[misc]
        self.cumulative_length = left


class _PrunedStatic(PrunedLayer):
    """A static layer has all its columns from the start; those not yet written come last."""

    max_cache_len: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, self.dropped


@cache
def _pruned_class(base: type) -> type:
    mixin: type = PrunedLayer
    if getattr(base, "is_compileable", False):
        mixin = _PrunedStatic
    elif getattr(base, "is_sliding", False):
        mixin = _PrunedSliding
    # transformers registers classes of layers by a type that they name.
    return type(f"Pruned{base.__name__}", (mixin, base), {"_layer_type": None})


def make_pruned(layers: list[Any], place: int, dropped: int, kept: KeptColumns | None) -> None:
    """Put one that knows that it lacks ``dropped`` tokens of every row in the place of a layer."""
    layer = layers[place]
    if not isinstance(layer, PrunedLayer):
        layers[place] = layer = _restored(type(layer), vars(layer))
    layer.dropped, layer.kept = dropped, kept


def _restored(base: type, state: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_pruned_class(base))
    vars(layer).update(state)
    return layer
