"""dartfx's exceptions and its warning; ``except DartfxError`` catches every exception."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DartfxError",
    "InputError",
    "KernelUnavailableError",
    "PruningWarning",
    "RanksError",
    "SelectionError",
    "UnsupportedGraphError",
]


class DartfxError(Exception):
    """Base class of every error that dartfx raises on purpose."""


class ConfigError(DartfxError, ValueError):
    """An option is unknown, has the wrong type, is out of range, or contradicts another."""


class InputError(DartfxError, ValueError):
    """A model, image, prompt or file that was named cannot be used.

    argument: what named it, such as "image"; the command line's option of that name.
    """

    def __init__(self, argument: str, why: str) -> None:
        super().__init__(argument, why)
        self.argument = argument
        self.why = why

    def __str__(self) -> str:
        return self.why


class SelectionError(DartfxError, ValueError):
    """The selection cannot be made for these inputs, for example without losing a text token."""


class KernelUnavailableError(DartfxError, RuntimeError):
    """The kernel given by name cannot run on this machine."""


class RanksError(DartfxError, RuntimeError):
    """A rank of a tensor-parallel model did not answer, so the ranks cannot agree."""


class UnsupportedGraphError(DartfxError, RuntimeError):
    """A graph holds vision tokens but cannot be pruned, and ``on_unsupported`` is ``"error"``.

    Attributes: ``because`` (the reason), ``where`` (the user's source line, or ``""``) and
    ``advice`` (what to try, or ``""``).
    """

    def __init__(self, because: str, where: str = "", advice: str = "") -> None:
        super().__init__(because, where, advice)
        self.because = because
        self.where = where
        self.advice = advice

    def __str__(self) -> str:
        parts = [f"cannot prune this graph: {self.because}"]
        if self.where:
            parts.append(f"at: {self.where}")
        if self.advice:
            parts.append(f"try: {self.advice}")
        return "\n  ".join(parts)


class PruningWarning(UserWarning):
    """A graph that holds vision tokens was compiled without pruning; the message says why."""
