"""dartfx: DART vision-token pruning as a ``torch.compile`` backend.

``torch.compile(model, backend="dart")`` needs no import of this package; these are the tools
around it.
"""

from dartfx.backend.pre_pass import PrePass, as_pre_pass
from dartfx.config.options import DartConfig
from dartfx.errors import (
    ConfigError,
    DartfxError,
    KernelUnavailableError,
    PruningWarning,
    RanksError,
    SelectionError,
    UnsupportedGraphError,
)
from dartfx.export.metadata import ChangedOutput, ExportedPruning, exported_pruning
from dartfx.export.prune_exported import prune_exported
from dartfx.model.compile import compile, explain, reset
from dartfx.observe.report import Report, reports
from dartfx.ops import select_tokens
from dartfx.runtime.vision_mask import media_tokens, vision_tokens
from dartfx.selection.registry import register_selector
from dartfx.token_map.kept_tokens import kept_tokens
from dartfx.token_map.overlay import overlay, overlay_html
from dartfx.verification.verify import Verification, verify

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
