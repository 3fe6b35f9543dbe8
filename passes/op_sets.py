"""Families of ATen operators, as overload packets.

An operator that the installed torch does not have is left out of its family.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from dartfx import compat

aten = torch.ops.aten


def named(*names: str) -> frozenset[object]:
    """ATen packets by name; those this torch does not have are left out."""
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


# The same values: in another dtype, in other memory, under another shape.
CONVERSIONS = named("to", "_to_copy")
COPIES = named("clone", "contiguous")
RESHAPES = named("view", "reshape", "_unsafe_view")
REGROUPS = RESHAPES | named("unflatten")
BROADCASTS = named("squeeze", "unsqueeze", "expand", "expand_as")
# Views that are cheaper to repeat than to gather.
REPEATED_VIEWS = named("unsqueeze", "transpose")

# Attention, fused or as ``softmax(mask(q @ k.T * scale)) @ v``.
SDPA = named("scaled_dot_product_attention")
SOFTMAX = named("softmax", "_softmax", "_safe_softmax")
SCORE_PRODUCTS = named("matmul", "bmm", "einsum")
SCORE_MASKING = named("add", "add_", "masked_fill", "masked_fill_", "where")
SCORE_SCALING = named("mul", "mul_", "div", "div_")
SCORE_VIEWS = RESHAPES | COPIES
# Elementwise though not tagged so.
SCORE_ELEMENTWISE = SCORE_MASKING | CONVERSIONS | named("dropout", "mul_", "div_")

# Matrix products, by the names of the two factors.
FACTORS = {
    **dict.fromkeys(named("matmul"), ("self", "other")),
    **dict.fromkeys(named("mm", "bmm"), ("self", "mat2")),
    **dict.fromkeys(named("addmm"), ("mat1", "mat2")),
    **dict.fromkeys(named("baddbmm"), ("batch1", "batch2")),
}
# Two dims swapped, by the names of the arguments that say which; () for the last two.
SWAPPED_DIMS = {
    **dict.fromkeys(named("transpose", "swapdims"), ("dim0", "dim1")),
    **dict.fromkeys(named("swapaxes"), ("axis0", "axis1")),
    **dict.fromkeys(named("t", "mT"), ()),
}

# Norms hold no projection, and more than value by value work.
PROJECTIONS = named("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")
VALUE_BY_VALUE = CONVERSIONS | COPIES | named("dropout", "alias")

# Writes of rows at a mask or at indices.
MASKED_SCATTER = named("masked_scatter", "masked_scatter_")
INDEX_PUT = named("index_put", "index_put_")
# Of all that is row by row, what gives no NaN for any row, nor in its gradient.
ROW_BY_ROW = CONVERSIONS | named("clone", "add", "sub", "mul", "neg")

# Expert routing: the order of a sort, rescaled or counted.
KEEPS_ORDER = CONVERSIONS | COPIES | named("floor_divide")
COUNTS = named("histc", "bincount")

ASSERTIONS = named(
    "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size"
)

# Calls with several results, of which each ``getitem`` is related to the operand.
MULTI_OUTPUT = named(
    "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "topk", "max", "min",
    "sort", "cummax", "native_layer_norm",
) | {
    "torchao::choose_qparams_affine", "dartfx::chunk_gated_delta_rule", "dartfx::mamba2_chunk_scan",
}  # fmt: skip

# Operators whose size argument lists the output's dims one by one, by that argument's name.
SIZED = {
    **dict.fromkeys(named("view", "_unsafe_view", "expand", "broadcast_to"), "size"),
    **dict.fromkeys(named("reshape"), "shape"),
    **dict.fromkeys(named("new_zeros", "new_ones", "new_empty", "new_full"), "size"),
}


def is_higher_order(node: Node) -> bool:
    """Whether a node calls a graph or another function, as ``torch.cond`` does.

    False where torch lacks the class: a region around vision tokens is then declined.
    """
    higher_order = compat.find("HigherOrderOperator")
    return higher_order is not None and isinstance(node.target, higher_order)
