"""The time profile of a run: its slowest tests, and the time of each file."""

from __future__ import annotations

from collections import defaultdict

import pytest

SLOWEST = 20


class Timing:
    """A pytest plugin: setup, call and teardown of each test together, from all of xdist's workers.

    Several workers' seconds add up to more than the run took.
    """

    def __init__(self) -> None:
        self.tests: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, list[float]] = defaultdict(list)
        for name, seconds in self.tests.items():
            files[name.partition("::")[0]].append(seconds)
        if not files:
            return
        terminalreporter.section(f"{SLOWEST} slowest tests")
        for name, seconds in sorted(self.tests.items(), key=_second, reverse=True)[:SLOWEST]:
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
        terminalreporter.section("seconds by file")
        rows = [(name, sum(times), len(times)) for name, times in files.items()]
        for name, total, count in sorted(rows, key=lambda row: row[1], reverse=True):
            terminalreporter.write_line(f"{total:7.1f} s  {count:4} tests  {name}")
        total = sum(self.tests.values())
        terminalreporter.write_line(f"{total:7.1f} s  {len(self.tests):4} tests  in all")


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
