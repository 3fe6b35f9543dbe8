"""The selection operator: its definition in torch, its registration, and its public form."""

from __future__ import annotations

from dartfx.ops.public import select_tokens

__all__ = ["select_tokens"]
