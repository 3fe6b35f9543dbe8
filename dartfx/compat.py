"""Private names of torch that dartfx reads, each once, with the versions it was seen in.

A name that a later torch lacks costs the one thing it serves, never ``import dartfx`` or
``backend="dart"``: what needs it calls :func:`load`, and ``python -m dartfx doctor`` lists
:func:`missing`.  Names that dartfx still imports directly are to move here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["DYNAMO_STRINGS", "PrivateName", "Unavailable", "load", "missing"]


class Unavailable(Exception):
    """A private name is not where it was in the versions it was seen in."""


@dataclass(frozen=True)
class PrivateName:
    """One private name: where it stands, in which versions it was seen, what needs it."""

    module: str
    attribute: str
    seen: str
    use: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


_SIZES = "error texts that show a size do not fix that size (dartfx.backend.dynamo_patch)"

DYNAMO_STRINGS = {
    name: PrivateName(f"torch._dynamo.{module}", name, "torch 2.11 to 2.13", _SIZES)
    for name, module in {
        "InstructionTranslatorBase": "symbolic_convert",
        "LazySymNodeFormatString": "variables.lazy",
        "LazyVariableTracker": "variables.lazy",
        "StringFormatVariable": "variables.misc",
    }.items()
}


def load(name: PrivateName) -> Any:
    """The object of this name.  Raises Unavailable, with the name and what needs it."""
    try:
        return getattr(importlib.import_module(name.module), name.attribute)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{name} (seen in {name.seen}) is missing; {name.use}") from error


def missing() -> list[PrivateName]:
    """Every private name listed here that this torch does not have."""
    lacking = []
    for name in DYNAMO_STRINGS.values():
        try:
            load(name)
        except Unavailable:
            lacking.append(name)
    return lacking
