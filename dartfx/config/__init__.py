"""The options of the backend: their meaning, validation, and the fingerprint of a result."""

from dartfx.config.options import DartConfig

__all__ = ["DartConfig"]
