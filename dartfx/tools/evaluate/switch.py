"""A selector that dispatches to another, looked up on each run.

A graph that runs eagerly can thus be measured with many selectors.  Compiled code would have one
of them built in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dartfx.selection.registry import get_selector, optional_inputs, register_selector

__all__ = ["name_for", "selecting"]

_PLAIN, _ASKING = "(as measured)", "(as measured, with queries)"
_LOOKING = "(as measured, with the tower's attention)"
_names: list[str] = []  # the last one is active


@contextmanager
def selecting(name: str) -> Iterator[None]:
    """Make the selectors of this module select as ``name`` does."""
    _names.append(name)
    try:
        yield
    finally:
        _names.pop()


def name_for(selectors: Collection[str]) -> str:
    """The selector that can replace all of these: with queries only if one of them needs them.

    Those that need the tower's attention can only be replaced together.
    """
    if all("tower_attention" in optional_inputs(name) for name in selectors):
        return _LOOKING
    return _ASKING if any("queries" in optional_inputs(name) for name in selectors) else _PLAIN


@register_selector(_PLAIN)
def _plain(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    *,
    valid_mask: Tensor,
    most: int,
    **keywords: Any,
) -> Tensor:
    name = _names[-1]
    own = {"valid_mask": valid_mask, "most": most}
    keywords.update({k: v for k, v in own.items() if k in optional_inputs(name)})
    return get_selector(name)(hidden, keys, vision_mask, text_mask, budget, **keywords)


@register_selector(_ASKING)
def _asking(
    *given: Tensor, queries: Tensor, valid_mask: Tensor, most: int, **keywords: Any
) -> Tensor:
    if "queries" in optional_inputs(_names[-1]):
        keywords["queries"] = queries
    return _plain(*given, valid_mask=valid_mask, most=most, **keywords)


@register_selector(_LOOKING)
def _looking(
    *given: Tensor, tower_attention: Tensor, valid_mask: Tensor, most: int, **keywords: Any
) -> Tensor:
    keywords["tower_attention"] = tower_attention
    return _plain(*given, valid_mask=valid_mask, most=most, **keywords)
