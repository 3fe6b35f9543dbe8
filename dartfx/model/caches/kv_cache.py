"""How :func:`dartfx.compile` handles transformers' KV caches around a compiled call.

After a pruned prefill a cache's layers become such as know what they lack
(``pruned_layers.py``), so that transformers makes positions and masks of later calls.  What
it cannot know is which column of a caller's mask belongs to which token that is left: masks are
gathered before the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dartfx.errors import SelectionError
from dartfx.model.caches.counting import held_tokens, note_uncounted, require_counted
from dartfx.model.caches.pruned_layers import KeptColumns, PrunedLayer, extended, make_pruned
from dartfx.model.caches.weights import Weights
from dartfx.runtime.keep_idx import KeepIdxRecord

__all__ = [
    "Held",
    "fit_mask",
    "fitting_masks",
    "held_before",
    "held_in_slots",
    "is_cache",
    "is_sliding",
    "is_static",
    "mark_pruned",
    "pruned_length",
    "require_fitting",
    "slots_of",
    "with_traced_mask",
]


def is_cache(value: Any) -> bool:
    """Whether something is a transformers cache with layers."""
    return hasattr(value, "get_seq_length") and isinstance(getattr(value, "layers", None), list)


def pruned_layers(cache: Any) -> list[PrunedLayer]:
    """The layers of a cache that lack tokens."""
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer) and layer.dropped]


def pruned_length(cache: Any) -> int:
    """How many tokens pruning removed from every row of a transformers cache's shortest layer."""
    return max((layer.dropped for layer in pruned_layers(cache)), default=0)


def is_static(cache: Any) -> bool:
    """Whether a transformers cache is static in all layers."""
    layers = cache.layers
    return bool(layers) and all(hasattr(layer, "max_cache_len") for layer in layers)


def slots_of(cache: Any) -> int | None:
    """How many tokens a static cache can hold; None for one that grows or of windows only."""
    slots = (getattr(layer, "max_cache_len", None) for layer in cache.layers)
    full = (n for n, layer in zip(slots, cache.layers, strict=True) if not is_sliding(layer))
    return min((n for n in full if n is not None), default=None)


def held_in_slots(cache: Any) -> int:
    """How many tokens each layer of full attention holds.  A static one waits for the device."""
    # Recurrent layers hold no tokens.
    layer = next((each for each in cache.layers if hasattr(each, "get_seq_length")), None)
    return 0 if layer is None else int(layer.get_seq_length()) - getattr(layer, "dropped", 0)


def require_fitting(caches: Sequence[Any], tokens: int, weights: Weights) -> None:
    """Raise SelectionError where so many tokens cannot continue a pruned cache with this model.

    Of the layout "layered" only one can: transformers makes one mask for all layers, and their
    columns are not the same tokens.
    """
    for cache in caches:
        require_counted(cache)
    for cache in filter(pruned_layers, caches):
        weights.require_own(pruned_layers(cache)[0].kept)
        if tokens > 1 and any(map(_columns_differ, pruned_layers(cache))):
            raise SelectionError(
                f"{tokens} tokens continue a KV cache whose layers hold different tokens of a "
                'pruned prompt (kv_layout="layered"), which no one mask fits. Compile with the '
                "default kv_layout, or decode one token at a time"
            )
        if tokens > 1 and is_static(cache):
            _require_room(cache, tokens)


def _require_room(static: Any, tokens: int) -> None:
    held, slots = held_in_slots(static), slots_of(static)
    if slots is not None and held + tokens > slots:
        raise SelectionError(
            f"{tokens} more tokens do not fit a static KV cache of {slots} slots that holds {held} "
            "of a pruned conversation; give generate a max_cache_len for all turns"
        )


def _columns_differ(layer: PrunedLayer) -> bool:
    return layer.kept is None or layer.kept.keep_idx is None


class Held(NamedTuple):
    """What a cache held before a call: columns and seen tokens by layer, and what was kept."""

    columns: dict[int, int]
    seen: dict[int, int]
    kept: KeptColumns | None


EMPTY = Held({}, {}, None)


def held_before(cache: Any) -> Held:
    """What a cache holds now; nothing of static ones, which are filled by another."""
    if is_static(cache):
        return EMPTY
    columns = _columns_by_layer(cache)
    seen = {n: int(cache.layers[n].get_seq_length()) for n in columns}
    return Held(columns, seen, next((each.kept for each in pruned_layers(cache)), None))


def _columns_by_layer(cache: Any) -> dict[int, int]:
    return {n: held for n, layer in enumerate(cache.layers) if (held := held_tokens(layer))}


def mark_pruned(
    cache: Any,
    tokens: int,
    records: Sequence[KeepIdxRecord],
    masks: Sequence[Tensor] = (),
    before: Held | None = None,
    weights: Weights | None = None,
) -> None:
    """Record on the layers of a cache that this call filled which tokens they lack.

    tokens: S; records: of each graph that returned keep_idx; masks: those of the call that may say
    which tokens are no pads, [B, columns] or [B, 1, S, columns]; weights: the model's.
    """
    before, columns = before or EMPTY, _columns_by_layer(cache)
    new = {n: held - before.columns.get(n, 0) for n, held in columns.items()}
    new = {n: held for n, held in new.items() if held > 0}
    if not records or not new:
        if records:
            note_uncounted(cache)
        return
    left, lengths = records[-1].keep_idx.shape[1], list(new.values())
    if max(lengths) > tokens or lengths[-1] > left:  # the cache of another model, or an older one
        return
    first = next(iter(new))
    seen, past = before.seen.get(first, 0), before.columns.get(first, 0)
    total = seen + tokens
    kept = KeptColumns(total, None)
    if all(held == left for n, held in new.items() if not is_sliding(cache.layers[n])):
        kept = extended(before.kept, seen, past, records[-1].keep_idx, tokens, masks)
    digest = None if weights is None else weights.digest()
    kept = replace(kept, weights=digest, log_sizes=records[-1].log_sizes)
    for n, held in new.items():
        layer = cache.layers[n]
        missing = tokens - (left if is_sliding(layer) else held)
        if is_sliding(layer):
            layer.cumulative_length = total
        elif isinstance(getattr(layer, "cumulative_length", None), int):
            # Quantised layers count in Python, where the compiled call counted the prompt's.
            layer.cumulative_length = columns[n]
        make_pruned(cache.layers, n, getattr(layer, "dropped", 0) + missing, kept)


def is_sliding(layer: Any) -> bool:
    """Whether a cache layer keeps the last tokens only."""
    return bool(getattr(layer, "is_sliding", False))


@contextmanager
def fitting_masks(caches: Sequence[Any]) -> Iterator[None]:
    """Mark that masks are gathered for pruned layers inside the ``with`` block."""
    layers = [layer for cache in caches for layer in pruned_layers(cache)]
    for layer in layers:
        layer.masks_fit = True
    try:
        yield
    finally:
        for layer in layers:
            layer.masks_fit = False


def fit_mask(cache: Any, mask: Tensor, tokens: int) -> Tensor:
    """A mask for ``tokens`` more tokens on a pruned cache, with the columns that the cache has.

    mask: [B, columns] or [B, 1, tokens, columns], for all tokens seen so far and the new ones, or
    for those that the cache holds and the new ones.  transformers reads the last columns of the
    former kind, so those of kept tokens go there, in the places of what was dropped are zeros.
    Raises SelectionError for another length or number of rows.
    """
    layer = next(iter(pruned_layers(cache)), None)
    if layer is None or layer.kept is None or layer.kept.keep_idx is None:
        return mask
    kept, keep_idx, dropped = layer.kept, layer.kept.keep_idx.to(mask.device), layer.dropped
    if hasattr(layer, "max_cache_len") and mask.ndim == 4:
        sizes = [each.get_mask_sizes(tokens) for each in pruned_layers(cache)]
        first = [start - dropped for columns, start in sizes if columns == mask.shape[-1]]
        return _without_pads(mask, kept, first[0] if first else 0)
    length = mask.shape[-1]
    seen = layer.get_seq_length() + tokens
    if length not in (seen, seen - dropped):
        raise SelectionError(
            f"an attention mask of {length} columns came with {tokens} tokens and a cache that "
            f"holds {seen - tokens - dropped} of {seen - tokens} tokens; give one of {seen} "
            f"columns, for all tokens, or of {seen - dropped}, for those that are left"
        )
    if len(mask) != len(keep_idx):
        raise SelectionError(
            f"an attention mask of {len(mask)} rows came with a cache that was pruned with "
            f"{len(keep_idx)} rows; give generate the batch as it will be decoded"
        )
    if length == seen:
        if mask.ndim == 4:
            keep_idx = keep_idx[:, None, None].expand(*mask.shape[:3], -1)
        old, new = mask[..., : kept.tokens], mask[..., kept.tokens :]
        mask = torch.cat([old.gather(-1, keep_idx), new], -1)
    return mask if mask.ndim == 4 else torch.nn.functional.pad(mask, (dropped, 0))


def with_traced_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decode step's arguments with its masks fitted, while it is traced."""
    kv, given = kwargs.get("past_key_values"), kwargs.get("attention_mask")

    def fitted(mask: Any) -> Any:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            return mask
        return fit_mask(kv, mask, mask.shape[2])

    if kv is None or given is None:
        return kwargs
    if isinstance(given, dict):  # one for each kind of layer
        return kwargs | {"attention_mask": {kind: fitted(mask) for kind, mask in given.items()}}
    return kwargs | {"attention_mask": fitted(given)}


def _without_pads(mask: Tensor, kept: KeptColumns, first: int) -> Tensor:
    """A static cache's mask [B, 1, t, slots], as ``generate`` makes it, with pads hidden.

    first: the column of the cache's tokens that is in the first slot.
    """
    if kept.valid is None:
        return mask
    pads = ~kept.valid.to(mask.device)
    columns = torch.arange(mask.shape[-1], device=mask.device) + first
    known = columns < pads.shape[1]
    hidden = pads[:, columns.clamp(max=pads.shape[1] - 1)] & known
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden[:, None, None], lowest)
