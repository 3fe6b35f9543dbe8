"""The order of a run's files: longest first, so that no long one is left at the end."""

from __future__ import annotations

import pytest

# By the seconds that `make test-all` prints; all others take less than half a minute.
LONGEST = [
    "tools/test_families.py",
    "tools/test_evaluate.py",
    "distributed/test_ranks.py",
    "export/test_export_package.py",
    "properties/test_properties.py",
    "families/test_shapes.py",
    "backend/test_parity.py",
    "passes/test_stages.py",
    "compilation/test_outlining.py",
    "layout/test_docs.py",
    "families/test_inputs_and_outputs.py",
    "caches/test_kv_cache.py",
    "model/test_generate.py",
    "tools/test_bench_generate.py",
    "selection/test_merge.py",
    "backend/test_backend.py",
    "caches/test_turns.py",
    "cli/test_commands.py",
    "model/test_calls.py",
    "wrappers/test_peft.py",
    "backend/test_sliding_window.py",
    "examples/test_batch_caption.py",
    "integrations/test_answering.py",
    "ops/test_triton_interpreted.py",
    "backend/test_batch_sizes.py",
    "wrappers/test_autocast.py",
    "compilation/test_warm_start.py",
    "export/test_export.py",
    "examples/test_examples.py",
]


def longest_first(items: list[pytest.Item]) -> None:
    """Sort by file; within a file, and among the files that are not listed, the order stays."""
    places = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
