"""The selection operator: its definition in torch, its registration, and its public form."""

from __future__ import annotations

import dartfx.ops.covering
import dartfx.ops.farthest
import dartfx.ops.keep_given  # noqa: F401  registers torch.ops.dartfx.keep_given
from dartfx.ops.select_tokens import select_tokens

__all__ = ["select_tokens"]
