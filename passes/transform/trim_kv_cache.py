"""KV caches: the layout a prefill leaves behind, and trimming the early layers' caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dartfx.passes.analysis.axes import TokenAxes
from dartfx.passes.graph import Size, argument, aten, hint, is_one, packet, sizes
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Request
from dartfx.passes.site import Site
from dartfx.passes.transform.gather_frontier import Gatherer


@dataclass(frozen=True)
class CacheLayout:
    """What a prefill leaves for decode.

    layout: "layered" or "uniform"; caches: keys and values that the graph returns, by layer;
    window: the tokens that sliding-window caches keep, None without such.
    """

    layout: str
    caches: dict[Node, int]
    window: int | None


def plan_cache_layout(
    site: Site, output: Node, axes: TokenAxes, left: Size, request: Request
) -> CacheLayout:
    """The layout for caches of which some will hold only ``left`` tokens (S' after all cuts).

    Raises Refusal for one that decode could not read.
    """
    sliding, wanted = tails(site, output, axes), request.kv_layout
    width = window(sliding)
    if width is not None and not bool(left >= width):
        return_whole(sliding, output, left, request)
        width, wanted = None, "uniform"
    caches = cached(site, output, axes)
    return CacheLayout(choose_layout(site, wanted, caches), caches, width)


def cached(site: Site, output: Node, axes: TokenAxes) -> dict[Node, int]:
    """Keys and values [B, H, S, Dh] of decoder layers that the graph returns, with their layer.

    Attention weights are returned 4-D too, but have two token dims.
    """
    return {
        node: site.stack.layer_of[node]
        for node in output.all_input_nodes
        if node in site.stack.layer_of and axes.dims(node) == (2,) and len(sizes(node)) == 4
    }


def tails(site: Site, output: Node, axes: TokenAxes) -> list[Node]:
    """Sliding-window caches that the graph returns: ``keys[:, :, -window + 1:]`` of all keys."""
    return [n for n in output.all_input_nodes if _is_tail(n, site, axes)]


def _is_tail(node: Node, site: Site, axes: TokenAxes) -> bool:
    if packet(node) is not aten.slice or node not in site.stack.layer_of:
        return False
    keys, start = argument(node, "self"), argument(node, "start")
    return axes.dims(keys) == (2,) and len(sizes(keys)) == 4 and type(start) is int and start < 0


def window(tails: Sequence[Node]) -> int | None:
    """The most tokens that a sliding-window cache keeps; None without such caches."""
    return max((-argument(n, "start") for n in tails), default=None)


def return_whole(tails: Sequence[Node], output: Node, kept: Size, request: Request) -> None:
    """Return all S' tokens of sliding caches whose window they do not fill.

    transformers counts the tokens of a sliding cache in a Python number, which dynamo fixed while
    tracing.  Once a window is full the number no longer matters; before, decode reads caches of
    all layers by it.  Raises Refusal where the caller does not set it right after the call.
    """
    if not request.fixes_sliding_lengths or request.kv_layout == "layered":
        raise Refusal(
            f"{hint(kept)} tokens would be left for sliding-window caches of {window(tails)}, and "
            "decode counts on as many as the prompt had",
            advice='dartfx.compile, which counts them anew, with kv_layout="auto"; or '
            "use_cache=False to decode nothing",
        )
    for tail in tails:
        output.replace_input_with(tail, argument(tail, "self"))
        if not tail.users:
            tail.graph.erase_node(tail)


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


def trim(site: Site, output: Node, caches: dict[Node, int], gather: Gatherer) -> dict[Node, int]:
    """Uniform layout: caches of layers before the cut are gathered as they leave the graph.

    Returns all caches as they are then.
    """
    trimmed = {}
    for node, index in caches.items():
        new = gather(node, output) if index < site.layer else node
        if new is not node:
            output.replace_input_with(node, new)
        trimmed[new] = index
    return trimmed
