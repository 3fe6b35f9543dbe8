"""Cache layers that lack dropped tokens, and report both lengths to transformers.

transformers derives positions, and which tokens are new, from the number of tokens that a cache
layer has seen, and masks from the number of columns that it holds and where they begin.  Its
sliding windows report different values for the two, and so do these layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dartfx.errors import SelectionError

__all__ = ["KeptColumns", "PrunedLayer", "extended", "make_pruned"]


@dataclass(frozen=True)
class KeptColumns:
    """Which tokens the first columns of a cache hold.

    tokens: how many tokens they represent, all until the last image that was pruned; keep_idx:
    [B, columns] int64, positions among them, ascending, None where layers hold different ones;
    valid: [B, columns] bool, false at pads, None where all calls came without a mask; weights: what
    tells apart those that computed them, None where nothing does; log_sizes: [B, columns] float32,
    what attention scores of these keys get added, None where attention is not calibrated.
    """

    tokens: int
    keep_idx: Tensor | None
    valid: Tensor | None = None
    weights: str | None = None
    log_sizes: Tensor | None = None

    @property
    def columns(self) -> int:
        """How many columns these are; 0 where layers hold different ones."""
        return 0 if self.keep_idx is None else self.keep_idx.shape[1]

    def rows(self, index: Tensor) -> KeptColumns:
        """The same for these rows of the batch."""
        if self.keep_idx is None:
            return self
        index = index.to(self.keep_idx.device)
        valid = None if self.valid is None else self.valid[index]
        sizes = None if self.log_sizes is None else self.log_sizes[index]
        return replace(self, keep_idx=self.keep_idx[index], valid=valid, log_sizes=sizes)

    def first(self, tokens: int) -> KeptColumns:
        """The same for the first tokens only.

        Raises SelectionError where rows hold different numbers of them.
        """
        keep_idx, left = self.keep_idx, None
        if keep_idx is not None:
            held = (keep_idx < tokens).sum(1).tolist()
            left = held[0] if len(set(held)) == 1 else None
        if keep_idx is None or left is None:
            raise SelectionError(
                f"the KV cache cannot be cropped to {tokens} of the {self.tokens} tokens that were "
                "pruned, since its rows or layers hold different ones of them; crop less, or "
                "compute the prompt again"
            )
        valid = None if self.valid is None else self.valid[:, :left]
        sizes = None if self.log_sizes is None else self.log_sizes[:, :left]
        kept = replace(self, tokens=tokens, keep_idx=keep_idx[:, :left])
        return replace(kept, valid=valid, log_sizes=sizes)


def extended(
    old: KeptColumns | None,
    seen: int,
    past: int,
    keep_idx: Tensor,
    tokens: int,
    masks: Sequence[Tensor],
) -> KeptColumns:
    """Which tokens a cache holds after this call; seen, past: tokens and columns before it."""
    rows, device = keep_idx.shape[0], keep_idx.device
    start, parts = 0, []
    if old is not None and old.keep_idx is not None:
        start, parts = old.tokens, [old.keep_idx.to(device)]
    between = torch.arange(start, seen, device=device).expand(rows, -1)
    logical = torch.cat([*parts, between, keep_idx + seen], 1)
    physical = torch.cat([torch.arange(past, device=device).expand(rows, -1), keep_idx + past], 1)
    valid = _valid(masks, tokens, {seen + tokens: logical, past + tokens: physical})
    if valid is None and old is not None and old.valid is not None:
        later = logical.shape[1] - old.valid.shape[1]
        valid = torch.nn.functional.pad(old.valid, (0, later), value=True)
    return KeptColumns(seen + tokens, logical, valid)


def _valid(masks: Sequence[Tensor], tokens: int, columns: dict[int, Tensor]) -> Tensor | None:
    """Which of the columns left are no pads, by the first mask of the call.

    columns: by a mask's length, which of its columns they are, [B, columns left].
    """
    for mask in masks:
        if mask.ndim == 4 and mask.shape[-2] == tokens:
            mask = mask[:, 0, -1]  # the last token sees all that are no pads
            mask = mask if mask.dtype == torch.bool else mask == 0
        chosen = columns.get(mask.shape[-1])
        if chosen is not None and mask.ndim == 2 and len(mask) == len(chosen):
            return mask.bool().gather(1, chosen.to(mask.device))
    return None


class PrunedLayer:
    """Mixin in front of a transformers cache layer, whose keys lack ``dropped`` tokens per row.

    kept: of which tokens its first columns are; None before anything was pruned.
    masks_fit: whether the caller gathers masks as the columns were.
    offloaded: whether its cache moves it to the host and back, in separate streams.
    """

    keys: Any
    values: Any
    dropped = 0
    kept: KeptColumns | None = None
    masks_fit = False
    offloaded = False

    def get_seq_length(self) -> Any:
        """How many tokens the layer has seen: an int, or a tensor of a static layer."""
        return self._held() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns attention gets, and which token's the first one counts as."""
        self._check_pads()
        return self._held() + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: a negative number of them, or a positive number to be left."""
        super().crop(-self._cropped(tokens_to_remove)[1])  # type: ignore[misc]
        if self.keys is not None:
            if self.offloaded:
                torch.accelerator.synchronize()  # it may be on its way
            # Views of another stride each time would be compiled for, one by one.
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def _cropped(self, tokens_to_remove: int) -> tuple[int, int]:
        """How many tokens a crop leaves and how many columns it removes; those are forgotten."""
        seen, kept = int(self.get_seq_length()), self.kept
        left = min(tokens_to_remove, seen) if tokens_to_remove > 0 else seen + tokens_to_remove
        if kept is None or left >= kept.tokens:
            return left, seen - left
        self.kept = kept.first(left)
        self.dropped = left - self.kept.columns
        return left, seen - kept.tokens + kept.columns - self.kept.columns

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
        if self.kept is not None and self.kept.keep_idx is not None:
            rows = torch.arange(self.kept.keep_idx.shape[0]).repeat_interleave(repeats)
            self.kept = self.kept.rows(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so it is made again from its base where it is loaded.
        return _restored, (type(self).__bases__[1], self.__dict__)

    def _held(self) -> Any:
        return super().get_seq_length()  # type: ignore[misc]

    def _check_pads(self) -> None:
        """Raise SelectionError where a mask is missing, for pads or calibrated keys."""
        if self.masks_fit or self.kept is None:
            return
        if self.kept.log_sizes is not None:
            raise SelectionError(
                "the keys of this KV cache are calibrated, and only a model compiled by "
                "dartfx.compile makes the masks for that; call such a model, or prune with "
                "calibrate=False"
            )
        if self.kept.valid is None:
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
        left, columns = self._cropped(tokens_to_remove)
        super(PrunedLayer, self).crop(-columns)  # type: ignore[misc]
        self.cumulative_length = left


class _PrunedStatic(PrunedLayer):
    """A static layer has all its columns from the start; those not yet written come last.

    A static sliding window counts its tokens as those with all columns do, from the first one that
    was kept, and moves on from its first slot once it is full.
    """

    max_cache_len: int
    is_initialized: bool
    unpruned_len: int | None = None  # its slots, before it was shortened

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        columns, first = super(PrunedLayer, self).get_mask_sizes(query_length)  # type: ignore[misc]
        return columns, first + self.dropped

    def get_max_length(self) -> int:
        """How many tokens it can have seen, or its window."""
        most: int = super().get_max_length()  # type: ignore[misc]
        return most if getattr(self, "is_sliding", False) else most + self.dropped

    def shorten(self, slots: int) -> None:
        """Allocate no more slots than these."""
        if not self.is_initialized and slots < self.max_cache_len:
            self.unpruned_len, self.max_cache_len = self.max_cache_len, slots

    def reset(self) -> None:
        super().reset()
        if self.unpruned_len is not None:  # another prompt may need them all
            self.max_cache_len, self.unpruned_len = self.unpruned_len, None
            self.keys = self.values = None
            self.is_initialized = False


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
