"""Every mutant of ``make mutants`` still fits the source."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_fits_the_source(mutant: Mutant) -> None:
    assert mutant.new in mutant.source(ROOT)
