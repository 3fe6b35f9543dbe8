"""``torch.ops.dartfx.select_spans``: any selector with a budget for each image of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.errors import SelectionError
from dartfx.selection import registry
from dartfx.selection.quotas import before_in_frames, share_out, span_numbers

__all__ = ["select_spans"]


# Opaque: how many images there are is known only from the mask's values, so it waits for the device
# once, and cannot be part of a CUDA graph.
@custom_op(
    "dartfx::select_spans",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor keys, Tensor vision_mask, Tensor text_mask, Tensor budget, "
        "Tensor? queries, Tensor? valid_mask, int pivot_image_tokens, int pivot_text_tokens, "
        "str selector, int[] quota, int min_tokens, bool frames, Tensor? tower_attention=None)"
        " -> Tensor"
    ),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def select_spans(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    queries: Tensor | None,
    valid_mask: Tensor | None,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
    selector: str,
    quota: Sequence[int],
    min_tokens: int,
    frames: bool,
    tower_attention: Tensor | None = None,
) -> Tensor:
    """What the selector keeps of each span, together: [B, S] bool, ``budget[b]`` in row b.

    Arguments as of a ``Selector`` and ``share_out``.  Raises SelectionError where they do not fit.
    """
    spans = span_numbers(vision_mask, frames)
    budgets = share_out(spans, budget, quota, min_tokens)
    given: dict[str, Any] = {"queries": queries, "tower_attention": tower_attention}
    given.update(valid_mask=valid_mask, most=int(budgets.max()), before=before_in_frames(spans))
    keywords = {name: given[name] for name in registry.optional_inputs(selector)}
    # What a selector of dartfx ranks by depends on no other positions, unless it requests them.
    narrow = keywords.keys() <= {"most"} and registry.is_exact(selector)
    keywords.update(pivot_image_tokens=pivot_image_tokens, pivot_text_tokens=pivot_text_tokens)
    kept = torch.zeros_like(vision_mask)
    for number in range(budgets.shape[1]):
        members, share = spans == number, budgets[:, number]
        at = ((members | text_mask).any(0) | (not narrow)).nonzero()[:, 0]
        chosen = registry.get_selector(selector)(
            *(hidden.index_select(1, at), keys.index_select(2, at)),
            *(members.index_select(1, at), text_mask.index_select(1, at), share),
            **keywords,
        )
        kept |= (whole := torch.zeros_like(kept).index_copy(1, at, chosen))
        _require_budget(whole, members, share, selector, number)
    return kept


def _require_budget(
    chosen: Tensor, members: Tensor, budget: Tensor, selector: str, number: int
) -> None:
    if registry.is_exact(selector):
        return
    met = (chosen.sum(1) == budget) & ~(chosen & ~members).any(1)
    for row, holds in enumerate(met.tolist()):
        if not holds:
            raise SelectionError(
                f"selector {selector!r} did not keep exactly {int(budget[row])} vision tokens of "
                f"image {number} in row {row}; return a [B, S] bool mask inside vision_mask with "
                "budget[b] True entries per row"
            )


@select_spans.register_fake
def _select_spans_fake(
    hidden: Tensor, keys: Tensor, vision_mask: Tensor, *others: object
) -> Tensor:
    return torch.empty_like(vision_mask)
