"""dartfx: DART vision-token pruning as a ``torch.compile`` backend.

``torch.compile(model, backend="dart")`` needs no import of this package; these are the tools
around it.
"""

from dartfx.api import compile, explain, reset
from dartfx.config import DartConfig
from dartfx.errors import (
    ConfigError,
    DartfxError,
    KernelUnavailableError,
    PruningWarning,
    RanksError,
    SelectionError,
    UnsupportedGraphError,
)
from dartfx.kept import kept_tokens
from dartfx.ops import select_tokens
from dartfx.picture import overlay, overlay_html
from dartfx.report import Report, reports
from dartfx.selectors import register_selector
from dartfx.verification import Verification, verify
from dartfx.vision import media_tokens, vision_tokens

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DartConfig",
    "DartfxError",
    "KernelUnavailableError",
    "PruningWarning",
    "RanksError",
    "Report",
    "SelectionError",
    "UnsupportedGraphError",
    "Verification",
    "compile",
    "explain",
    "kept_tokens",
    "media_tokens",
    "overlay",
    "overlay_html",
    "register_selector",
    "reports",
    "reset",
    "select_tokens",
    "verify",
    "vision_tokens",
]
