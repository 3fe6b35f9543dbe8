"""One value to one value of the same shape: every dim is kept, token by token."""

from __future__ import annotations

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import (
    argument,
    sizes,
)
from dartfx.passes.op_sets import named
from dartfx.passes.rules.table import align, reads_metadata_only, rule


@rule(
    *named(
        "add",
        "__and__",
        "__or__",
        "__xor__",
        "dropout",
        "masked_fill",
        "where",
        "copy_",
        "rsub",
        "floor_divide",
        "polar",
        "complex",
    )
)
def broadcast(axes: Axes, node: Node, out: Node) -> None:
    """Pointwise: dims align from the right."""
    for operand in node.all_input_nodes:
        align(axes, node, operand, out)


@rule(
    *named(
        "to", "_to_copy", "alias", "detach", "detach_", "clone", "contiguous",
        "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like",
        "rand_like", "randn_like", "softmax", "_softmax", "_safe_softmax", "log_softmax",
        "_log_softmax", "fill_", "zero_", "bernoulli", "bernoulli_",
    ),
    "_c10d_functional::all_reduce",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::broadcast",
)  # fmt: skip
def same_shape(axes: Axes, node: Node, out: Node) -> None:
    """The first operand's dims, unchanged.  Softmax weighs tokens but does not order them."""
    first = node.all_input_nodes[0]
    for dim in range(len(sizes(out))):
        axes.preserve(node, (first, dim), (out, dim))


@rule("_c10d_functional::all_gather_into_tensor")
def all_gather(axes: Axes, node: Node, out: Node) -> None:
    """The ranks' values end to end along dim 0; other dims stay."""
    first = node.all_input_nodes[0]
    for dim in range(1, len(sizes(out))):
        axes.preserve(node, (first, dim), (out, dim))


@rule(*named("type_as"))
def type_as(axes: Axes, node: Node, out: Node) -> None:
    """The first operand's dims; only the dtype of the second is read."""
    same_shape(axes, node, out)
    reads_metadata_only(axes, node, argument(node, "other"))


@rule(*named("new_zeros", "new_ones", "new_empty", "new_full"))
def new(axes: Axes, node: Node, out: Node) -> None:
    """Only the operand's dtype and device are read; what is written later relates the dims."""
    reads_metadata_only(axes, node, argument(node, "self"))


@rule(*named("_assert_tensor_metadata"))
def assert_metadata(axes: Axes, node: Node, out: Node) -> None:
    """Only the operand's dtype and device are read; an assertion on its shape would fail later."""
    if argument(node, "size") is None and argument(node, "stride") is None:
        reads_metadata_only(axes, node, argument(node, "a"))


@rule(*named("view_as_complex", "view_as_real", "one_hot"))
def leading_dims(axes: Axes, node: Node, out: Node) -> None:
    """The dims that both sides have; the last one appears or goes."""
    first = node.all_input_nodes[0]
    for dim in range(min(len(sizes(first)), len(sizes(out)))):
        axes.preserve(node, (first, dim), (out, dim))


@rule(*named("layer_norm", "rms_norm", "native_layer_norm"))
def normalise_last(axes: Axes, node: Node, out: Node) -> None:
    """Normalised over trailing dims; weights align with them."""
    first, *rest = node.all_input_nodes
    if len(sizes(out)) == len(sizes(first)):
        for operand in (first, *rest):
            align(axes, node, operand, out)
