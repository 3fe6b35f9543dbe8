"""Products with quantised weights, and the activations that are quantised for them, by row."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from dartfx.passes.analysis.axis_classes import Axes
from dartfx.passes.graph import argument, is_one, same_size, sizes, tensor
from dartfx.passes.op_sets import named
from dartfx.passes.rules.table import rule


@rule(
    *named(
        "_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu",
        "_dyn_quant_matmul_4bit",
    )
)  # fmt: skip
def by_row(axes: Axes, node: Node, out: Node) -> None:
    """x [M, I] times a weight in a packed format: [M, O]."""
    axes.preserve(node, (node.all_input_nodes[0], 0), (out, 0))


@rule("quanto::qbytes_mm")
def of_bytes(axes: Axes, node: Node, out: Node) -> None:
    """x [..., I] times a weight of bytes [O, I], with a scale for each of its rows."""
    for dim in range(len(sizes(out)) - 1):
        axes.preserve(node, (node.all_input_nodes[0], dim), (out, dim))


@rule(*named("_scaled_mm"))
def scaled_mm(axes: Axes, node: Node, out: Node) -> None:
    """The same with a scale for each row of x, or one for all."""
    by_row(axes, node, out)
    scales = argument(node, "scale_a")
    if tensor(scales) is not None and len(sizes(scales)) == 2:
        axes.preserve(node, (scales, 0), (out, 0))


@rule("torchao::choose_qparams_affine", "torchao::choose_scale_float8")
def choose_scales(axes: Axes, node: Node, out: Node) -> None:
    """A scale for each block of values; blocks that are one token long are the tokens' own."""
    values = node.all_input_nodes[0]
    for dim, scale_dim in _single(node, values, out):
        axes.preserve(node, (values, dim), (out, scale_dim))


@rule("torchao::quantize_affine", "torchao::dequantize_affine")
def quantise(axes: Axes, node: Node, out: Node) -> None:
    """Values to codes, or back, by a scale for each block."""
    values, *scales = node.all_input_nodes
    for scale in scales:
        for dim, scale_dim in _single(node, values, scale):
            axes.preserve(node, (values, dim), (scale, scale_dim))
            axes.preserve(node, (values, dim), (out, dim))


@rule(
    "torchao::quantize_affine_float8_non_decomposed",
    "torchao::dequantize_affine_float8_non_decomposed",
)
def quantise_float8(axes: Axes, node: Node, out: Node) -> None:
    """The same where the scales' shape gives the blocks: as many scales as values, or fewer."""
    values, *scales = node.all_input_nodes
    for dim, size in enumerate(sizes(values)):
        if all(len(sizes(s)) > dim and same_size(sizes(s)[dim], size) for s in scales):
            for scale in scales:
                axes.preserve(node, (values, dim), (scale, dim))
            axes.preserve(node, (values, dim), (out, dim))


def _single(node: Node, values: Node, scales: Node) -> Iterator[tuple[int, int]]:
    """Each dim of the values that is in blocks of one, and the scales' dim for it."""
    shape, kept = sizes(values), len(sizes(scales)) == len(sizes(values))
    scale_dim = 0
    for dim, block in enumerate(argument(node, "block_size")):
        if is_one(block) and scale_dim < len(sizes(scales)):
            yield dim, scale_dim
        if kept or is_one(block) or not same_size(block, shape[dim]):
            scale_dim += 1
