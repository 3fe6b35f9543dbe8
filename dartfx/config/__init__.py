"""The options of the backend: what they mean, what is valid, what identifies a result."""

from dartfx.config.options import DartConfig

__all__ = ["DartConfig"]
