"""A graph that merges vision tokens but holds no decoder: make it return their mask as well.

Before::

    unsqueeze: bool[1, S, 1] = aten.unsqueeze(eq, 2)
    masked_scatter: f32[1, S, 8] = aten.masked_scatter(arg1_1, unsqueeze, arg4_1)
    return (masked_scatter)

After::

    unsqueeze: bool[1, S, 1] = aten.unsqueeze(eq, 2)
    masked_scatter: f32[1, S, 8] = aten.masked_scatter(arg1_1, unsqueeze, arg4_1)
    select_int: bool[1, S] = aten.select.int(unsqueeze, 2, 0)
    new_empty_default: f32[N, 0] = aten.new_empty(masked_scatter, [add, 0])
    return (masked_scatter, select_int, new_empty_default)
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from dartfx.passes.analysis.locate import find_merges
from dartfx.passes.analysis.token_axes import infer_axes
from dartfx.passes.graph import (
    Emitter,
    aten,
    downstream,
    same_size,
    sizes,
    tensor,
    written_after,
)
from dartfx.passes.site import Vision
from dartfx.passes.transform.selection_inputs import vision_mask, vision_rows


def return_vision_mask(module: GraphModule) -> int | None:
    """Append the vision mask [B, S] and an empty [rows, 0] tensor to the graph's outputs.

    The empty tensor carries the number of feature rows in its shape, without reading data.
    Returns which output holds the merged embeddings; None (and no change) when none does.
    """
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    found = _merged_output(graph, output)
    if found is None:
        return None
    index, vision = found
    emit = Emitter(output)
    mask = vision_mask(emit, vision)
    row_count = emit(aten.new_empty.default, vision.embeds, [vision_rows(emit, vision), 0])
    returned = output.args[0]
    assert isinstance(returned, list | tuple)
    output.args = ((*returned, mask, row_count),)
    graph.lint()
    module.recompile()
    return index


def _merged_output(graph: Graph, output: Node) -> tuple[int, Vision] | None:
    returned = output.args[0]
    merges = [m for m in find_merges(graph) if not written_after(m.node, m.mask)]
    if not merges or not isinstance(returned, list | tuple):
        return None
    axes = infer_axes(graph)
    reached = {m: set(downstream(graph, [m.node])) for m in merges}
    for index, node in enumerate(returned):
        value = tensor(node)
        if not isinstance(node, Node) or value is None or value.ndim != 3:
            continue
        entering = [m for m in merges if node in reached[m] and axes.in_order(m.node, node)]
        if entering:
            masks = tuple(m.mask for m in entering)
            features = tuple(m.features for m in entering)
            return index, Vision(entering[-1].node, masks, features, "merge in this graph")
    return None


def earlier_embeddings(module: GraphModule, index: int) -> tuple[int, ...]:
    """The inputs whose rows and tokens are, in order, those of the output ``index``.

    Vision tokens that an earlier graph merged into one of them are among this output's, too.
    """
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    merged = output.args[0][index]
    axes = infer_axes(graph)
    return tuple(
        input_index
        for input_index, node in enumerate(graph.find_nodes(op="placeholder"))
        if (value := tensor(node)) is not None
        and value.ndim == 3
        and value.is_floating_point()
        and all(map(same_size, value.shape, sizes(merged)))
        and axes.in_order(node, merged)
    )
