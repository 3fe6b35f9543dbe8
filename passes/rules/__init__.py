"""The operators' rules, one file for each kind; see :mod:`.table` for what a rule is."""

from dartfx.passes.rules import (  # noqa: F401  they fill the table
    elementwise,
    indexing,
    order,
    products,
    quantised,
    regroup,
)
from dartfx.passes.rules.table import RULES, relate

__all__ = ["RULES", "relate"]
