"""KV caches as they leave the graph: windows opened, early layers trimmed to the pruned length.

Before, with the keys of the layers in front of and behind the cut::

    return (layer_norm, mul, mul_1)

After, under the uniform layout::

    index_select_default_2: f32[1, 2, S', 4] = aten.index_select(mul, 2, select_int_1)
    return (layer_norm, index_select_default_2, mul_1)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.graph import argument
from dartfx.passes.transform.gather_frontier import Gatherer


def return_whole(region: CutRegion, sliding: Sequence[Node]) -> None:
    """Return all tokens of sliding-window caches instead of the window's."""
    for tail in sliding:
        region.output.replace_input_with(tail, argument(tail, "self"))
        if not tail.users:
            tail.graph.erase_node(tail)
    if sliding:
        region.recompute()


def trim_caches(region: CutRegion, caches: dict[Node, int], gather: Gatherer) -> dict[Node, int]:
    """Gather those of ``caches`` that layers before the cut return, as they leave the graph.

    Returns all caches as they are then, with their layer.
    """
    trimmed = {}
    for node, index in caches.items():
        new = gather(node, region.output) if index < region.site.layer else node
        if new is not node:
            region.output.replace_input_with(node, new)
        trimmed[new] = index
    return trimmed
