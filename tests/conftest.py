"""What every test starts from: no leftover compilation state, no settings from the shell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The models are so small that a second thread only waits for the first.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixed seed, no ``DARTFX_DUMP``, and nothing that an earlier test compiled."""
    monkeypatch.delenv("DARTFX_DUMP", raising=False)
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
