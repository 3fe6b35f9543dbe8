"""Break dartfx on purpose, one mutant at a time, and see that the tests turn red on each.

    python tests/mutants.py [--list] [NAME ...]

The mutants are data: ``mutants.toml``.  They are applied to a temporary copy of the checkout,
never to the checkout itself.  The exit status is 1 if a mutant survives or cannot be applied.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


@dataclass(frozen=True)
class Mutant:
    """One break: the single ``old`` in ``file`` becomes ``new``; ``tests`` should fail, soonest."""

    name: str
    breaks: str
    file: Path
    old: str
    new: str
    tests: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    def source(self, tree: Path) -> str:
        """The mutated file's text.  Raises ValueError or SyntaxError where it does not fit."""
        found = (tree / self.file).read_text() if (tree / self.file).exists() else ""
        if (count := found.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds {self.old!r} {count} times, not once")
        mutated = found.replace(self.old, self.new)
        if ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(found)):
            raise ValueError(f"{self.new!r} changes nothing in {self.file}")
        return mutated


MUTANTS = [
    Mutant(**{**each, "file": Path(DATA["files"][each["file"]]), "tests": tuple(each["tests"])})
    for each in DATA["mutant"]
]


class Verdict(NamedTuple):
    """What became of a mutant.

    said: the error of the test that failed, or why none did; killer: that test as pytest names it,
    and env, what it ran with.
    """

    mutant: Mutant
    said: str
    seconds: float
    killer: str | None = None
    env: Mapping[str, str] | None = None


def copy_checkout(target: Path) -> None:
    """Copy what git tracks or would add, as it is now, but not the test of the snippets' text."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name) and Path(name).name != "test_mutants.py":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def python(tree: Path, *args: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run this interpreter so that it and its children import the tree's dartfx."""
    # Bytecode is matched by size and whole second, which mutant and original may share.
    ours = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    settings = {**os.environ, **ours, **env}
    return subprocess.run(
        [sys.executable, *args], cwd=tree, env=settings, capture_output=True, text=True
    )


def failing(
    tree: Path, tests: Sequence[str], env: Mapping[str, str], passing: Sequence[int] = (0, 4, 5)
) -> tuple[str, str] | None:
    """The first test that fails and its error; None for the exit codes ``passing``.

    4 and 5 say that pytest knows no such test.  Raises ValueError where pytest itself gives up: a
    mutant that cannot be imported is no mutant.
    """
    done = python(tree, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests, env=env)
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    # pytest-xdist ends with 2 after a failure, as pytest does after an error of collection.
    if done.returncode in (1, 2) and found:
        return found[1], found[2] or "failed"
    if done.returncode not in passing:
        said = done.stdout + done.stderr
        raise ValueError(f"pytest ended with {done.returncode}:\n{said[-2000:]}")
    return None


def located(tree: Path, hints: Sequence[str]) -> list[str]:
    """Hints as paths from the tree on; those whose file is missing are left out."""
    pairs = [hint.partition("::") for hint in hints]
    found = [(next((tree / "tests").rglob(name), None), sep + test) for name, sep, test in pairs]
    return [f"{path.relative_to(tree)}{test}" for path, test in found if path is not None]


@contextmanager
def applied(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with the mutant in it."""
    path = tree / mutant.file
    mutated, original = mutant.source(tree), path.read_bytes()
    path.write_text(mutated)
    try:
        yield
    finally:
        path.write_bytes(original)


def judge(tree: Path, mutant: Mutant) -> Verdict:
    """Run the mutant's own tests, then their whole files, then the quick suite, until one fails."""
    start = time.perf_counter()
    hints = located(tree, mutant.tests)
    files = [hint.partition("::")[0] for hint in hints]
    runs = (hints, mutant.env), (files, mutant.env), (DATA["quick_suite"], {})
    try:
        with applied(tree, mutant):
            for tests, env in runs:
                if tests and (failed := failing(tree, tests, env)):
                    return Verdict(mutant, failed[1], time.perf_counter() - start, failed[0], env)
    except (SyntaxError, ValueError) as refused:
        return Verdict(mutant, f"NOT APPLIED: {refused}", time.perf_counter() - start)
    return Verdict(mutant, "SURVIVED", time.perf_counter() - start)


def confirmed(tree: Path, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, without those whose test fails on the unchanged tree as well."""
    result = list(verdicts)
    for env in [dict(pairs) for pairs in {tuple((v.env or {}).items()) for v in verdicts}]:
        killers = sorted({v.killer for v in verdicts if v.killer and v.env == env})
        while killers and (failed := failing(tree, killers, env, passing=(0,))):
            killers.remove(failed[0])
            said = f"SURVIVED: {failed[0]} fails without it"
            for i, v in enumerate(result):
                if v.killer == failed[0]:
                    result[i] = v._replace(said=said, killer=None)
    return result


def selected(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, all without any.  Exits on a name that there is not."""
    known = {m.name: m for m in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no mutant named {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or MUTANTS


def main() -> int:
    parser = argparse.ArgumentParser(description="Break dartfx on purpose; the tests must notice.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; default: all")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    args = parser.parse_args()
    mutants = selected(args.names)
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name:26} {mutant.file}\n    {mutant.breaks}")
        return 0
    with tempfile.TemporaryDirectory(prefix="dartfx-mutants-") as folder:
        tree = Path(folder).resolve()
        copy_checkout(tree)
        verdicts = []
        for number, mutant in enumerate(mutants, 1):
            print(f"[{number}/{len(mutants)}] {mutant.name}: {mutant.breaks}", flush=True)
            verdicts.append(judge(tree, mutant))
            print(f"    {verdicts[-1].said}, {verdicts[-1].seconds:.0f} s", flush=True)
        print("The same tests without a mutant", flush=True)
        verdicts = confirmed(tree, verdicts)
    print(f"\n{'mutant':26} {'seconds':>7}  killed by")
    for v in verdicts:
        print(f"{v.mutant.name:26} {v.seconds:7.0f}  {v.killer or v.said.splitlines()[0]}")
    return int(any(v.killer is None for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
