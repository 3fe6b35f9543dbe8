"""``dartfx.select_tokens``: the operator with its arguments checked.

Inside a compiled graph call ``torch.ops.dartfx.select_tokens``, which takes N and reads nothing on
the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dartfx.ops.registration  # noqa: F401  (registers torch.ops.dartfx.select_tokens)
from dartfx.errors import SelectionError
from dartfx.ops.validation import check_arguments, check_counts, fail
from dartfx.selection.quotas import quota_arguments

__all__ = ["select_tokens"]


def select_tokens(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    retain: int,
    *,
    valid_mask: Tensor | None = None,
    pivot_image_tokens: int = 4,
    pivot_text_tokens: int = 4,
    selector: str = "dart",
    kernel: str = "auto",
    queries: Tensor | None = None,
    quota: str | Sequence[int] = "joint",
    min_tokens: int = 1,
    tower_attention: Tensor | None = None,
) -> Tensor:
    """Positions that stay when every sample keeps about ``retain`` vision tokens.

    hidden: [B, S, D] float, decoder layer output after the model's final norm.  keys: [B, H, S,
    Dh] float, the same layer's keys after rotary embedding.  vision_mask: [B, S] bool.
    valid_mask: [B, S] bool, False at pads; None means no pads.  For selectors that take them:
    queries: [B, Hq, S, Dh] float, rotary too, Hq a multiple of H: queries @ keys.T / sqrt(Dh) are
    attention scores; tower_attention: [B, S] float.  quota, min_tokens: the options.

    Returns keep_idx: [B, S'] int64, ascending in every row, with S' = S - N + min(retain, N) and N
    the vision tokens per row, rounded down; N is read from ``vision_mask`` on the host.  Every row
    keeps all its valid text; pads, lowest position first, and where rows differ in vision tokens
    also the number of those, make up the difference.  Ties go to the lowest position.

    Raises SelectionError for arguments of the wrong rank, shape, dtype, device or range, for text
    or quotas that do not fit a row, and for missing inputs that a selector asks for; ConfigError
    for an unknown selector or kernel; KernelUnavailableError for one that cannot run here.
    """
    given = hidden, keys, vision_mask, valid_mask
    check_arguments(*given, queries, tower_attention)
    pivots = {"pivot_image_tokens": pivot_image_tokens, "pivot_text_tokens": pivot_text_tokens}
    _check_numbers(quota, retain=retain, **pivots)
    vision_tokens = _read_vision_tokens(vision_mask, valid_mask, retain)
    options = *pivots.values(), selector, kernel, queries, *quota_arguments(quota, min_tokens)
    return _selected(*given, vision_tokens, retain, *options, tower_attention=tower_attention)


def _selected(*arguments: object, tower_attention: Tensor | None) -> Tensor:
    keep_idx: Tensor = torch.ops.dartfx.select_tokens(*arguments, tower_attention=tower_attention)
    return keep_idx


def _check_numbers(quota: str | Sequence[int], retain: int, **pivots: int) -> None:
    check_counts(retain=retain, **pivots)
    # What exceeds a row's budget is found where budgets are known.
    if not isinstance(quota, str) and sum(quota) < retain:
        raise SelectionError(
            f"quota={list(quota)} adds up to {sum(quota)}, but retain is {retain}; give numbers "
            "that add up to it"
        )


def _read_vision_tokens(vision_mask: Tensor, valid_mask: Tensor | None, retain: int) -> int:
    """N, after checks that need the masks' values; the host read of ``select_tokens``."""
    valid = torch.ones_like(vision_mask) if valid_mask is None else valid_mask
    counts = [vision_mask, vision_mask & ~valid, valid & ~vision_mask]
    vision, invalid, text = torch.stack([mask.sum(1) for mask in counts]).tolist()
    for row, count in enumerate(invalid):
        if count:
            raise fail(
                "valid_mask", f"is False at {count} vision tokens of row {row}; pads are not vision"
            )
    batch, sequence = vision_mask.shape
    if not any(vision):
        raise fail("vision_mask", "marks no vision token in the whole batch; nothing to select")
    vision_tokens = sum(vision) // batch
    length = sequence - vision_tokens + min(retain, vision_tokens)
    for row in range(batch):
        budget = min(vision[row], max(retain, vision[row] + length - sequence))
        if text[row] + budget > length:
            raise fail(
                "vision_mask",
                f"leaves no room for the text of row {row}: {text[row]} valid text positions and "
                f"{budget} kept vision tokens exceed the {length} positions that every row "
                "keeps, and text is never dropped; give every row the same number of vision "
                "tokens, pad the batch further, or run this row on its own",
            )
    return int(vision_tokens)
