"""Adapters for other programs; each module needs its program installed."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_manifest"]


def lmms_eval_manifest() -> Any:
    """Return the manifest of model "dartfx" for the entry point group ``lmms_eval.models``.

    The result is lmms-eval's ModelManifest.  It only names the classes: lmms-eval calls this at
    every start and imports a class when a run needs it.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "dartfx.integrations.lmms_eval"
    return ModelManifest(
        model_id="dartfx",
        chat_class_path=f"{module}.Dartfx",
        simple_class_path=f"{module}.DartfxSimple",
    )
