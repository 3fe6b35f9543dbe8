"""The order of a run's files: longest first, so that no long one is left at the end."""

from __future__ import annotations

import pytest

# By the seconds that `make test-all` prints; all others take less than half a minute.
LONGEST = [
    "tools/test_families.py",
    "distributed/test_ranks.py",
    "properties/test_properties.py",
    "caches/test_static_caches.py",
    "tools/test_evaluate.py",
    "export/test_export_package.py",
    "families/test_shapes.py",
    "model/test_generate.py",
    "passes/test_stages.py",
    "caches/test_kv_cache.py",
    "families/test_inputs_and_outputs.py",
    "ops/test_triton_interpreted.py",
    "backend/test_sizes.py",
    "layout/test_docs.py",
    "backend/test_sliding_window.py",
    "backend/test_parity.py",
    "ops/test_triton_compile.py",
    "export/test_export.py",
    "caches/test_caches_of_generate.py",
    "families/test_two_media.py",
    "model/test_prefill.py",
    "hybrids/test_hybrid_turns.py",
    "examples/test_examples.py",
    "examples/test_batch_caption.py",
    "wrappers/test_peft.py",
    "caches/test_turns.py",
    "integrations/test_answering.py",
    "backend/test_pre_pass.py",
    "compilation/test_outlining.py",
    "selection/test_merge.py",
    "wrappers/test_regions.py",
    "compilation/test_warm_start.py",
    "backend/test_batch_sizes.py",
    "caches/test_other_caches.py",
]


def longest_first(items: list[pytest.Item]) -> None:
    """Sort by file; within a file, and among the files that are not listed, the order stays."""
    places = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
