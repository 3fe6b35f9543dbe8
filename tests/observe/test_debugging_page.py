"""The commands in docs/debugging.md run verbatim, on a tiny model and its dump."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from dartfx.cli.main import main
from tests.support.plain.decoders import Decoder, Sizes, prompt, run

PAGE = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()
START = r"(?:dartfx|python -m dartfx|python dumps/graph_000/repro\.py)"
# In a table or a sentence between backticks; after a dollar sign in a block.
FOUND = re.findall(rf"`({START} [^`]+)`|^\$ ({START} .+)$", PAGE, re.MULTILINE)
# "what dartfx profile does" is no call; the others have tests of their own, and take long.
MENTIONED = {"dartfx profile", "python -m dartfx bench generate", "python -m dartfx doctor"}
COMMANDS = sorted({inline or block for inline, block in FOUND} - MENTIONED)
FOLDERS = ("before", "after", "dumps_6", "dumps_4", "dumps/rank_0", "dumps/rank_1")


def is_slow(command: str) -> bool:
    return "--model" in command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: with a dump under each name that the page gives one."""
    torch._dynamo.reset()
    found, z = tmp_path_factory.mktemp("debugging"), Sizes(seq=24, vision=9, layers=3)
    run(Decoder(z), prompt(z), retain_tokens=4, dump=found / "dumps")
    for name in FOLDERS:
        shutil.copytree(found / "dumps" / "graph_000", found / name / "graph_000")
    return found


def test_the_page_names_commands() -> None:
    words = {word for command in COMMANDS for word in command.split()}
    assert {"diff", "doctor", "explain", "profile", "show", "--bisect"} <= words


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow) if is_slow(command) else command
        for command in COMMANDS
    ],
)
def test_the_command_runs(
    command: str, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if "NAME" in command:
        saved: Path = request.getfixturevalue("saved")
        image = str(saved / "image.png")
        command = command.replace("NAME", str(saved)).replace("FILE", image)
        command = command.replace("--retain-tokens 16", "--retain-tokens 6")  # of 16, not 576
    words = shlex.split(command.replace("python -m ", "").replace("python ", ""))
    if words[0] != "dartfx":
        runpy.run_path(words[0])["main"](words[1:])
        return
    # The page shows what is said of a layer that the model lacks.
    assert main(words[1:]) == ("--layer" in words)


def test_its_first_table_has_ten_symptoms_each_with_a_command_and_what_to_read() -> None:
    rows = [line.split(" | ") for line in PAGE.split("\n\n")[2].splitlines()[2:]]
    assert len(rows) >= 10
    assert all(len(row) == 3 and "`" in row[1] + row[2] for row in rows)
    for _, _, read in rows:
        for section in re.findall(r"\(#([\w-]+)\)", read):
            title = section.replace("-", " ")
            assert re.search(rf"^## {title}\??$", PAGE, re.MULTILINE | re.IGNORECASE), section
