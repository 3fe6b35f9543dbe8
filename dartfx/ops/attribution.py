"""``torch.ops.dartfx.picked_by``: which pivot kept each vision token, for display."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.selection.batch_rule import Size, plan_batch
from dartfx.selection.dart import cosines, plan_turns, stable_order, take_first

__all__ = ["in_prompt", "picked_by"]


# Opaque to the compiler: it runs only with the option ``tokens``, and a graph of
# one fallback call compiles faster than a fused one. It reads nothing on the host, so it may be
# in a CUDA graph.
@custom_op(
    "dartfx::picked_by",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor keys, Tensor vision_mask, Tensor? valid_mask, SymInt vision_tokens,"
        " SymInt retain, int pivot_image_tokens, int pivot_text_tokens) -> Tensor"
    ),
)
def picked_by(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
) -> Tensor:
    """For each position the pivot that kept it when the "dart" selector chooses.

    Arguments as those of ``torch.ops.dartfx.select_tokens``.  Returns [B, S] int64: the pivot's
    position, the position itself for a pivot (a text pivot, too), -1 for all others.
    """
    plan = plan_batch(vision_mask, valid_mask, vision_tokens, retain)
    turns = plan_turns(
        keys, vision_mask, plan.text_after, plan.budget, pivot_image_tokens, pivot_text_tokens
    )
    position = torch.arange(vision_mask.shape[1], device=vision_mask.device)
    picker = torch.where(turns.image_pivots | turns.text_pivots, position, -1)
    if turns.pivots.shape[1] == 0:
        return picker
    orders = stable_order(cosines(hidden, turns.pivots))
    left = vision_mask & ~turns.image_pivots
    for j in range(turns.pivots.shape[1]):
        taken = take_first(orders[:, j], left, turns.quota[:, j])
        picker = torch.where(taken, turns.pivots[:, j, None], picker)
        left = left & ~taken
    return picker


@picked_by.register_fake
def _picked_by_fake(
    hidden: Tensor, keys: Tensor, vision_mask: Tensor, *others: Tensor | Size | None
) -> Tensor:
    return vision_mask.new_empty(vision_mask.shape, dtype=torch.int64)


@custom_op(
    "dartfx::in_prompt",
    mutates_args=(),
    schema="(Tensor picker, Tensor before, Tensor vision_mask) -> Tensor",
)
def in_prompt(picker: Tensor, before: Tensor, vision_mask: Tensor) -> Tensor:
    """Pickers of a later cut, in the prompt's positions.

    picker: [B, S'] int64, as :func:`picked_by` gives it for a sequence that was cut already.
    before: [B, S'] int64, the prompt's position of each position of that sequence.  vision_mask:
    [B, S] bool, of the prompt.  Returns [B, S] int64, -1 also at tokens dropped by earlier cuts.
    """
    named = torch.where(picker >= 0, before.gather(1, picker.clamp(min=0)), -1)
    unnamed = torch.full_like(vision_mask, -1, dtype=torch.int64)
    return unnamed.scatter(1, before, named)


@in_prompt.register_fake
def _in_prompt_fake(picker: Tensor, before: Tensor, vision_mask: Tensor) -> Tensor:
    return vision_mask.new_empty(vision_mask.shape, dtype=torch.int64)
