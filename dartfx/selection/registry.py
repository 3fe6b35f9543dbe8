"""The selector registry: which rule picks the vision tokens that a row keeps.

A selector is a small function of tensors. It decides only which vision tokens stay; the operator
around it applies the batch rule, keeps the text, drops pads and builds the indices.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dartfx.errors import ConfigError
from dartfx.selection import attended, changed, cover, fastv, simple, spread
from dartfx.selection.dart import dart

__all__ = [
    "BUILT_IN",
    "OPTIONAL",
    "Selector",
    "get_selector",
    "is_exact",
    "is_random",
    "needs_keys",
    "optional_inputs",
    "register_selector",
    "selector_fingerprint",
    "selector_names",
    "uses_key_norms_only",
]


# What a selector is given only where its signature names it, keyword-only: what nobody asks for is
# not carried into the compiled graph.
OPTIONAL = ("queries", "valid_mask", "most", "before", "tower_attention")


class Selector(Protocol):
    """Chooses exactly ``budget[b]`` vision tokens in every row ``b``.

    hidden: [B, S, D] float, after the final norm.  keys: [B, H, S, Dh] float, after rotary
    embedding.  vision_mask: [B, S] bool.  text_mask: [B, S] bool, valid text after the row's last
    vision token.  budget: [B] int64, at most the row's vision tokens.  Returns kept: [B, S] bool,
    inside vision_mask.  Keywords: pivot_image_tokens, pivot_text_tokens: int.

    A selector that has a keyword-only parameter of that name is also given
    queries: [B, Hq, S, Dh] float, after rotary embedding, of the layer whose keys these are; Hq is
    a multiple of H, each key serving Hq / H of them in turn, and ``queries @ keys.T / sqrt(Dh)``
    are that layer's attention scores before its mask (and before a soft cap, where it has one).
    valid_mask: [B, S] bool, False at pads.
    before: [B, S] int64, for a vision token the position of the same place in the frame before, -1
    without one; under a quota by frames or images only.
    tower_attention: [B, S] float, the attention that each vision token gets in the vision tower's
    last layer, 0 elsewhere; only where the tower is in the decoder's graph.
    most: an int or SymInt that no budget exceeds, for loops that cannot read budgets on the host.

    It is traced once and compiled: shapes must not depend on values, and sizes may be symbolic.
    """

    def __call__(
        self,
        hidden: Tensor,
        keys: Tensor,
        vision_mask: Tensor,
        text_mask: Tensor,
        budget: Tensor,
        /,
        *none: Any,  # nothing is: with this and the next, mypy lets selectors name what they take
        **keywords: Any,
    ) -> Tensor: ...


_F = TypeVar("_F", bound=Selector)

# Published methods that have another name here.
_ELSEWHERE = {
    "divprune": (
        "; DivPrune's farthest point is 'spread' here, which also counts how far apart two tokens "
        "are in vision order"
    ),
}


@dataclass(frozen=True)
class _Entry:
    selector: Selector
    fingerprint: str
    exact: bool
    optional_inputs: tuple[str, ...]
    uses_key_norms_only: bool
    is_random: bool
    needs_keys: bool


_ENTRIES: dict[str, _Entry] = {}


def register_selector(name: str, *, needs_keys: bool = True) -> Callable[[_F], _F]:
    """Decorator that adds a selector to the registry under ``name``.

    needs_keys: False for one that may also select before layer 0, where ``keys`` are [B, 0, S, 1].
    Raises ConfigError if the name is taken or empty, or if the function is not a plain Python
    function with the signature of ``Selector``.
    """
    # Nothing is known of it: it may read keys in any way, and draw numbers.
    return _register(
        name, exact=False, uses_key_norms_only=False, is_random=True, needs_keys=needs_keys
    )


def selector_names() -> tuple[str, ...]:
    """Names of all registered selectors, sorted."""
    return tuple(sorted(_ENTRIES))


def get_selector(name: str) -> Selector:
    """The selector registered under ``name``; raises ConfigError for an unknown name."""
    return _entry(name).selector


def selector_fingerprint(name: str) -> str:
    """Hash of a selector's source, so that a compile cache notices when it was edited.

    It covers the file that defines the function (its code where there is no file), its defaults
    and the values it closes over, as they were at registration. Other modules that the function
    calls are not covered.  Raises ConfigError for an unknown name.
    """
    return _entry(name).fingerprint


def is_exact(name: str) -> bool:
    """Whether the selector is known to meet its budget, so that the operator need not check."""
    return _entry(name).exact


def optional_inputs(name: str) -> tuple[str, ...]:
    """Which of ``OPTIONAL`` the selector takes; raises ConfigError for an unknown name."""
    return _entry(name).optional_inputs


def uses_key_norms_only(name: str) -> bool:
    """Whether the selector is known to read no more of keys than their L1 norms."""
    return _entry(name).uses_key_norms_only


def is_random(name: str) -> bool:
    """Whether the selector may draw numbers, so that equal inputs may be selected from unlike."""
    return _entry(name).is_random


def needs_keys(name: str) -> bool:
    """Whether the selector reads keys or queries, so that it cannot select before layer 0."""
    return _entry(name).needs_keys or "queries" in _entry(name).optional_inputs


def _register(
    name: str,
    *,
    exact: bool = True,
    uses_key_norms_only: bool = True,
    is_random: bool = False,
    needs_keys: bool = True,
) -> Callable[[_F], _F]:
    if not isinstance(name, str) or not name or " @ " in name:
        raise ConfigError(
            f"a selector's name must be a non-empty string without ' @ ', got {name!r}"
        )

    def add(function: _F) -> _F:
        if name in _ENTRIES:
            raise ConfigError(
                f"a selector named {name!r} is already registered; choose another name"
            )
        plain = inspect.unwrap(function)
        if not isinstance(plain, FunctionType):
            raise ConfigError(f"selector {name!r} must be a Python function, got {function!r}")
        optional = _optional_inputs(name, function)
        _ENTRIES[name] = _Entry(
            function,
            _fingerprint(plain),
            exact,
            optional,
            uses_key_norms_only,
            is_random,
            needs_keys,
        )
        return function

    return add


def _optional_inputs(name: str, function: Callable[..., Tensor]) -> tuple[str, ...]:
    """The optional inputs in a selector's signature; raises ConfigError where it is none."""
    signature = inspect.signature(function)
    keywords = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    optional = tuple(each for each in OPTIONAL if each in keywords)
    given = dict.fromkeys(("pivot_image_tokens", "pivot_text_tokens", *optional))
    try:
        signature.bind(*range(5), **given)
    except TypeError as error:
        raise ConfigError(
            f"selector {name!r} cannot be called as a selector ({error}); it takes (hidden, keys, "
            "vision_mask, text_mask, budget, *, pivot_image_tokens, pivot_text_tokens) and, "
            f"keyword-only, any of {', '.join(OPTIONAL)}"
        ) from None
    return optional


def _entry(name: str) -> _Entry:
    try:
        return _ENTRIES[name]
    except (KeyError, TypeError):
        pass
    near = difflib.get_close_matches(str(name), _ENTRIES, n=1)
    hint = _ELSEWHERE.get(str(name)) or (f"; did you mean {near[0]!r}?" if near else "")
    names = ", ".join(map(repr, selector_names()))
    raise ConfigError(f"unknown selector {name!r}; registered: {names}{hint}")


def _fingerprint(function: FunctionType) -> str:
    digest = hashlib.sha256(function.__qualname__.encode())
    for part in _source(function):
        digest.update(len(part).to_bytes(8, "little") + part)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    digest.update(repr((function.__defaults__, function.__kwdefaults__, cells)).encode())
    return digest.hexdigest()


def _source(function: FunctionType) -> Iterator[bytes]:
    path = Path(function.__code__.co_filename)
    if path.is_file():
        yield path.read_bytes()
    else:
        yield from _code(function.__code__)


def _code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant).encode()


_register("attended", needs_keys=False)(attended.attended)
_register("changed", needs_keys=False)(changed.changed)
_register("cover", needs_keys=False)(cover.cover)
_register("dart")(dart)
_register("fastv", uses_key_norms_only=False)(fastv.fastv)
_register("random", is_random=True, needs_keys=False)(simple.random)
_register("relevant", uses_key_norms_only=False)(cover.relevant)
_register("spread", needs_keys=False)(spread.spread)
_register("tiled")(spread.tiled)
_register("uniform", needs_keys=False)(simple.uniform)

# What is there without a registration of the user's own.
BUILT_IN = selector_names()
