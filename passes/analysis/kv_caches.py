"""The KV caches that a prefill returns, and the layout of them that decode can read.  Read-only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.analysis.token_axes import TokenAxes
from dartfx.passes.graph import Size, argument, aten, hint, is_one, packet, sizes
from dartfx.passes.refusal import Refusal
from dartfx.passes.request import Request
from dartfx.passes.site import Site


@dataclass(frozen=True)
class CacheLayout:
    """What a prefill leaves for decode.

    layout: "layered" or "uniform"; caches: keys and values that the graph returns, by layer;
    window: the tokens that sliding-window caches keep, None without such;
    return_whole: sliding caches of which all S' tokens must be returned instead of the window.
    """

    layout: str
    caches: dict[Node, int]
    window: int | None
    return_whole: tuple[Node, ...] = ()


def plan_cache_layout(region: CutRegion, length: Size, request: Request) -> CacheLayout:
    """The layout for caches of which some will hold only ``length`` tokens (S' after all cuts).

    On symbolic sizes whether a sliding window stays full installs a guard, because the graph
    differs.  Raises Refusal where decode could not read any layout.
    """
    site, axes, returned = region.site, region.axes, region.output.all_input_nodes
    sliding, wanted = sliding_caches(site, returned, axes), request.kv_layout
    width = window(sliding)
    if region.continues_cache:
        _require_known_columns(site, returned, axes, request)
    if width is not None and request.varies:
        raise Refusal(
            "sliding-window caches of one length or another are laid out by how many tokens are "
            "left, which here is known only when a call comes",
            advice="retain_tokens or reduction_ratio when the model is compiled",
        )
    if width is None or bool(length >= width):
        caches = kv_caches(site, returned, axes)
        return CacheLayout(choose_layout(site, request, caches), caches, width)
    # transformers counts the tokens of a sliding cache in a Python number, which dynamo fixed while
    # tracing.  Once a window is full the number no longer matters; before, decode reads caches of
    # all layers by it.
    counting = "" if request.fixes_sliding_lengths else "dartfx.compile, which counts them, with "
    if counting or wanted == "layered":
        raise Refusal(
            f"{hint(length)} tokens would be left for sliding-window caches of {width}, and "
            "decode counts on as many as the prompt had",
            advice=f'{counting}kv_layout="auto"; or use_cache=False to decode nothing',
        )
    whole = {tail: argument(tail, "self") for tail in sliding}
    caches = kv_caches(site, dict.fromkeys(whole.get(n, n) for n in returned), axes)
    return CacheLayout("uniform", caches, None, tuple(sliding))


def _require_known_columns(
    site: Site, returned: Iterable[Node], axes: TokenAxes, request: Request
) -> None:
    """Raise Refusal where no caller tracks which tokens a continued cache's columns are."""
    if not request.gathers_decode_mask:
        raise Refusal(
            "vision tokens come on a KV cache that already holds tokens (a system prompt, an "
            "earlier turn, a prefix), which then could not say which of them it lacks",
            advice="dartfx.compile, or the whole conversation without past_key_values",
        )
    for node in returned:
        if packet(node) is aten.slice and axes.joined_dims(argument(node, "self")) == (2,):
            raise Refusal(
                "vision tokens come on sliding-window caches that already hold tokens",
                node,
                advice="the whole conversation without past_key_values",
            )


def kv_caches(site: Site, returned: Iterable[Node], axes: TokenAxes) -> dict[Node, int]:
    """Keys and values [B, H, S, Dh] of decoder layers among what a graph returns, by layer.

    Attention weights are returned 4-D too, but have two token dims.
    """
    return {
        node: site.stack.layer_of[node]
        for node in returned
        if node in site.stack.layer_of
        and (2,) in (axes.dims(node), axes.joined_dims(node))
        and len(sizes(node)) == 4
    }


def sliding_caches(site: Site, returned: Iterable[Node], axes: TokenAxes) -> list[Node]:
    """Sliding-window caches among what a graph returns: ``keys[:, :, -window + 1:]``."""
    return [n for n in returned if _is_window(n, site, axes)]


def _is_window(node: Node, site: Site, axes: TokenAxes) -> bool:
    if packet(node) is not aten.slice or node not in site.stack.layer_of:
        return False
    keys, start = argument(node, "self"), argument(node, "start")
    return axes.dims(keys) == (2,) and len(sizes(keys)) == 4 and type(start) is int and start < 0


def window(sliding: Sequence[Node]) -> int | None:
    """The most tokens that a sliding-window cache keeps; None without such caches."""
    return max((-argument(n, "start") for n in sliding), default=None)


def choose_layout(site: Site, request: Request, caches: dict[Node, int]) -> str:
    """The layout to use.  Raises Refusal for one that decode could not read.

    transformers builds one mask from one layer's length, so caches of unequal length are exact only
    where no mask is needed: one new token of one row, no padding, no mask at the attention.  A
    caller that fits masks may continue caches by any number of tokens, if all hold the same ones.
    """
    if site.layer == 0 and len(request.stages) == 1:
        return "uniform"  # no layer sees the whole prompt, so there is nothing to choose
    wanted, one_row = request.kv_layout, is_one(sizes(site.hidden)[0])
    if wanted == "auto":
        exact = one_row and site.attention_mask is None and not request.gathers_decode_mask
        return "layered" if exact or not caches else "uniform"
    if wanted == "layered" and caches and not one_row:
        raise Refusal(
            'kv_layout="layered" leaves caches of unequal length, which the one decode mask of a '
            "batch cannot fit",
            advice='kv_layout="uniform" or "auto"',
        )
    return wanted
