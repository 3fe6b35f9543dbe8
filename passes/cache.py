"""KV caches: the layout a prefill leaves behind, and trimming the early layers' caches."""

from __future__ import annotations

from torch.fx import Node

from .axes import TokenAxes
from .facts import Refusal, Site
from .gather import Gatherer
from .graph import is_one, sizes


def cached(site: Site, output: Node, axes: TokenAxes) -> dict[Node, int]:
    """Keys and values [B, H, S, Dh] of decoder layers that the graph returns, with their layer.

    Attention weights are returned 4-D too, but have two token dims.
    """
    return {
        node: site.stack.layer_of[node]
        for node in output.all_input_nodes
        if node in site.stack.layer_of and axes.dims(node) == (2,) and len(sizes(node)) == 4
    }


def choose_layout(site: Site, wanted: str, caches: dict[Node, int]) -> str:
    """The layout to use.  Raises Refusal for one that decode could not read.

    transformers builds one decode mask from one layer's length, so caches of unequal length are
    exact only where no mask is needed: one row, no padding, no mask at the attention.
    """
    one_row = is_one(sizes(site.hidden)[0])
    if wanted == "auto":
        exact = one_row and site.attention_mask is None
        return "layered" if exact or not caches else "uniform"
    if wanted == "layered" and caches and not one_row:
        raise Refusal(
            'kv_layout="layered" leaves caches of unequal length, which the one decode mask of a '
            "batch cannot fit",
            advice='kv_layout="uniform" or "auto"',
        )
    return wanted


def trim(site: Site, output: Node, caches: dict[Node, int], gather: Gatherer) -> None:
    """Uniform layout: caches of layers before the cut are gathered as they leave the graph."""
    for node, index in caches.items():
        if index < site.layer:
            output.replace_input_with(node, gather(node, output))
