"""A single launch of two processes for ``make test``; ``test_ranks.py`` tests everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dartfx.tools.zoo.registry import load
from tests.support.tolerances import CLOSE

pytest.importorskip("accelerate", reason="transformers needs it to load a tensor-parallel model")
from tests.support.processes.ranks import Part, case, check_forwarded, run, unpruned


def test_two_ranks_forward_as_one_and_decline_together(tmp_path: Path) -> None:
    llava = load("llava", layers=3)
    failing = case("one_rank_fails", name="fails", rank=1, steps=1)
    found = run(tmp_path, 2, Part(llava, [case("forward"), failing]))
    check_forwarded(llava, "one", [rank["forward one"] for rank in found])
    for rank, result in enumerate(found):
        failed = result["fails"]
        assert failed["kinds"] == ["Declined"]
        assert ("rank 1 of 2 cannot prune its part" in failed["because"][0]) == (rank == 0)
        torch.testing.assert_close(failed["logits"][:, 0], unpruned(llava)[:, -1], **CLOSE)
