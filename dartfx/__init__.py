"""dartfx: DART vision-token pruning as a ``torch.compile`` backend.

``torch.compile(model, backend="dart")`` needs no import of this package; these are the tools
around it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dartfx._version import __version__ as __version__
from dartfx.backend.pre_pass import PrePass, as_pre_pass
from dartfx.backend.warm_start.cache_files import load_cache, save_cache
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
from dartfx.model.compile import budget, compile, reset, uncompile
from dartfx.model.explain import explain
from dartfx.model.history import kept_tokens, reports
from dartfx.observe.report import Report
from dartfx.ops import select_tokens
from dartfx.runtime.kept_positions import kept_positions
from dartfx.runtime.vision_mask import media_tokens, vision_tokens
from dartfx.selection.registry import register_selector

if TYPE_CHECKING:
    from dartfx.export.prune_exported import prune_exported
    from dartfx.token_map.overlay import overlay, overlay_html
    from dartfx.verification.verify import Verification, verify
else:
    # Imported at first use: compiling needs none of these, and each brings further modules.
    # None may be named like a submodule: importing that would put the module in its place.
    _LAZY = {
        "Verification": "dartfx.verification.verify",
        "overlay": "dartfx.token_map.overlay",
        "overlay_html": "dartfx.token_map.overlay",
        "prune_exported": "dartfx.export.prune_exported",
        "verify": "dartfx.verification.verify",
    }

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_LAZY[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY})


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
    "budget",
    "compile",
    "explain",
    "exported_pruning",
    "kept_positions",
    "kept_tokens",
    "load_cache",
    "media_tokens",
    "overlay",
    "overlay_html",
    "prune_exported",
    "register_selector",
    "reports",
    "reset",
    "save_cache",
    "select_tokens",
    "uncompile",
    "verify",
    "vision_tokens",
]
