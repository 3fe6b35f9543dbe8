"""The order of a run's files: the longest first, so that none is left for one worker at the end."""

from __future__ import annotations

import pytest

# By the seconds that `make test-all` prints; all others take less than half a minute.
LONGEST = [
    "tools/test_families.py",
    "families/test_shapes.py",
    "families/test_inputs_and_outputs.py",
    "distributed/test_ranks.py",
    "passes/test_stages.py",
    "properties/test_properties.py",
    "model/test_generate.py",
    "tools/test_evaluate.py",
    "backend/test_parity.py",
    "export/test_export_package.py",
    "backend/test_backend.py",
    "tools/test_bench_generate.py",
    "passes/test_queries.py",
    "ops/test_triton_interpreted.py",
    "compilation/test_warm_start.py",
    "layout/test_docs.py",
    "export/test_export.py",
    "backend/test_sliding_window.py",
    "integrations/test_answering.py",
    "examples/test_examples.py",
]


def longest_first(items: list[pytest.Item]) -> None:
    """Sort by file; within a file, and among the files that are not listed, the order stays."""
    places = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
