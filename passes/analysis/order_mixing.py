"""Which operators behind a cut mix tokens by their order, and whether that was allowed.  Read-only.

Attention weighs tokens by their content and their original positions.  A causal convolution or a
recurrence along the sequence reads which token came before: behind a cut that is the kept token
before, as for an eager model that is pruned by hooks.
"""

from __future__ import annotations

from torch.fx import Node

from dartfx.passes.analysis.cut_region import CutRegion
from dartfx.passes.outcome import OrderMixing
from dartfx.passes.refusal import Refusal
from dartfx.passes.rules.order import CAUSAL
from dartfx.passes.rules.table import qualified_name


def order_mixing(region: CutRegion, allowed: bool) -> OrderMixing | None:
    """The layers behind the cut that mix tokens by order, and by which operators; None without.

    Raises Refusal where there are some and ``allowed`` is False.
    """
    found = [
        n for n in region.nodes if qualified_name(n) in CAUSAL and _runs_along_tokens(region, n)
    ]
    if not found:
        return None
    layer_of = region.site.stack.layer_of
    layers = {layer_of.get(n) for n in found}
    mixing = OrderMixing(
        len(layers), tuple(dict.fromkeys(CAUSAL[qualified_name(n)] for n in found))
    )
    if not allowed:
        raise Refusal(
            f"{mixing}, and order_mixing='refuse' allows none",
            found[0],
            advice='order_mixing="allow", which runs them over the kept tokens, closed up',
        )
    return mixing


def _runs_along_tokens(region: CutRegion, node: Node) -> bool:
    return any(region.axes.dims(operand) for operand in node.all_input_nodes)
