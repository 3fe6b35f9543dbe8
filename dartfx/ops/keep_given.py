"""``torch.ops.dartfx.keep_given``: a selection that was made elsewhere, by the batch rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dartfx.ops.registration import TEXT_LOST, checked
from dartfx.selection.batch_rule import Size, keep_positions, kept_length, plan_batch

__all__ = ["keep_given"]


# Opaque to the compiler: a graph of one call compiles faster, and there is nothing to fuse.
@custom_op(
    "dartfx::keep_given",
    mutates_args=(),
    schema=(
        "(Tensor kept, Tensor vision_mask, Tensor? valid_mask, SymInt vision_tokens, SymInt retain)"
        " -> Tensor"
    ),
)
def keep_given(
    kept: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
) -> Tensor:
    """Positions that stay when exactly the marked vision tokens do.

    kept: [B, S] bool, inside vision_mask, as many per row as ``torch.ops.dartfx.select_tokens``
    would keep: R, or more where a row must make up for missing text.  Other arguments and the
    result keep_idx [B, S'] int64 as there.  Raises SelectionError naming the row for any other
    number, and where a row's text would not fit.
    """
    plan = plan_batch(vision_mask, valid_mask, vision_tokens, retain)
    budget = torch.ops.dartfx.require_rows(plan.budget, plan.fits, TEXT_LOST)
    return keep_positions(plan, checked(kept, vision_mask, budget, "the given mask"))


@keep_given.register_fake
def _keep_given_fake(
    kept: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
) -> Tensor:
    length = kept_length(vision_mask.shape[1], vision_tokens, retain)
    return vision_mask.new_empty((vision_mask.shape[0], length), dtype=torch.int64)
