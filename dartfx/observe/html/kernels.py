"""Which kernel of Inductor's code computes which value, from the comments in that code.

::

    # Topologically Sorted Source Nodes: [linear_2, mul], Original ATen: [aten.mm, aten.mul]
    extern_kernels.mm(...)                                 or triton_poi_fused_mul_3.run(...)

Inductor writes no such comment for its fused C++ kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["kernels"]

_CALL = re.compile(
    r"# Topologically Sorted Source Nodes: \[(?P<nodes>[^\]]*)\][^\n]*\n"
    r"(?:[^#\n]*\n){0,3}?[^#\n]*?"
    r"\b(?P<kernel>extern_kernels\.\w+|torch\.ops\.[\w.]+|\w+_fused_\w+)(?:\.run)?\("
)


def kernels(output_code: Sequence[str]) -> dict[str, list[str]]:
    """The kernels of each value, by the value's name."""
    found: dict[str, list[str]] = {}
    for path in output_code:
        try:
            code = Path(path).read_text()
        except OSError:
            continue
        for match in _CALL.finditer(code):
            for name in match["nodes"].split(", "):
                names = found.setdefault(name, [])
                if match["kernel"] not in names:
                    names.append(match["kernel"])
    return found
