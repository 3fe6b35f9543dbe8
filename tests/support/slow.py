"""Further cases of tested code paths, run only by ``make test-all``."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """``values`` as parameters that are marked slow; a tuple gives one test's several arguments."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values
    ]
