"""Starts programs in several processes, as ``torchrun`` does, and cleans all of them up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import psutil  # comes with accelerate
import pytest

_MARK = "DARTFX_TEST_RUN"


@dataclass(frozen=True)
class Run:
    """A launcher and what it started.  Ranks have sessions of their own, so they carry a mark."""

    launcher: subprocess.Popen[bytes]
    mark: str
    output: IO[str]

    def text(self) -> str:
        """All that was printed so far."""
        self.output.seek(0)
        return self.output.read()

    def processes(self) -> list[psutil.Process]:
        """What runs of it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End all of it at once, as when power fails."""
        found = self.processes()
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=30)
        self.launcher.wait(timeout=30)


@contextlib.contextmanager
def started(processes: int, *arguments: str) -> Iterator[Run]:
    """``torchrun`` on this machine; whatever it started ends with this context."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *arguments]
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as output:
        launcher = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: mark},
        )
        run = Run(launcher, mark, output)
        try:
            yield run
        finally:
            run.kill()


def torchrun(processes: int, *arguments: str, seconds: float = 1200) -> str:
    """What the program prints; the test fails where it fails, takes longer or leaves a process."""
    with started(processes, *arguments) as run:
        try:
            status = run.launcher.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s:\n{run.text()[-8000:]}")
        assert status == 0, run.text()[-8000:]
        assert run.processes() == []
        return run.text()
