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
from dartfx.export import prune_exported
from dartfx.exported_pruning import ChangedOutput, ExportedPruning, exported_pruning
from dartfx.kept import kept_tokens
from dartfx.ops import select_tokens
from dartfx.picture import overlay, overlay_html
from dartfx.pre_pass import PrePass, as_pre_pass
from dartfx.report import Report, reports
from dartfx.selectors import register_selector
from dartfx.verification import Verification, verify
from dartfx.vision import media_tokens, vision_tokens

__version__ = "0.1.0"

__all__ = [
    "ChangedOutput",
    "ConfigError",
    "DartConfig",
    "DartfxError",
    "ExportedPruning",
    "KernelUnavailableError",
    "PrePass",
    "PruningWarning",
    "RanksError",
    "Report",
    "SelectionError",
    "UnsupportedGraphError",
    "Verification",
    "as_pre_pass",
    "compile",
    "explain",
    "exported_pruning",
    "kept_tokens",
    "media_tokens",
    "overlay",
    "overlay_html",
    "prune_exported",
    "register_selector",
    "reports",
    "reset",
    "select_tokens",
    "verify",
    "vision_tokens",
]
