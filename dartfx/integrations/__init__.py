"""Adapters for other programs: a module for each, which needs that program installed."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_manifest"]


def lmms_eval_manifest() -> Any:
    """What lmms-eval reads from the entry point group ``lmms_eval.models``: its model "dartfx".

    Returns lmms-eval's ModelManifest.  Names the classes only: lmms-eval calls this whenever it
    starts, and imports a class when a run needs it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "dartfx.integrations.lmms_eval"
    return ModelManifest(
        model_id="dartfx",
        chat_class_path=f"{module}.Dartfx",
        simple_class_path=f"{module}.DartfxSimple",
    )
