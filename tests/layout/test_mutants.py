"""Every mutant of ``make mutants`` applies to the source and is covered by ``make test``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

import pytest

from tests.mutants import DATA, MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_fits_the_source(mutant: Mutant) -> None:
    assert mutant.new in mutant.source(ROOT)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_quick_suite_is_that_of_make_test() -> None:
    # -o: without an install, whatever is outdated.
    command = ["make", "--dry-run", "--no-print-directory", "-o", ".venv/.installed", "test"]
    # The tests may run under make themselves, whose flags and level this one would inherit.
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "ARGS"))
    }
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout)[1:] == ["-m", "pytest", *DATA["quick_suite"]]
