"""``python -m dartfx diff``: the differences between two dumps."""

from __future__ import annotations

import argparse
from pathlib import Path

from dartfx.errors import InputError
from dartfx.integrations.outputs import check_file
from dartfx.observe.compare import compare
from dartfx.observe.dumped import is_dump

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "dumps", nargs="+", metavar="DUMP",
        help="two or more folders that dump= wrote, or graph folders of them; each is compared "
        "with the first",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, help="also write the comparison as a page")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison; 0 when all graphs are equal, 1 when any differs.  Raises InputError."""
    check_file("html", arguments.html)
    first, *others = [_checked(name) for name in arguments.dumps]
    if not others:
        raise InputError("DUMP", "name at least two folders to compare")
    comparisons = [compare(first, other) for other in others]
    print(*comparisons, sep="\n\n")
    if arguments.html is not None:
        # The page's libraries take a while to import.
        from dartfx.observe.html.comparison import page

        arguments.html.write_text(page(comparisons))
        print(f"wrote {arguments.html}")
    return 0 if all(comparison.equal for comparison in comparisons) else 1


def _checked(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise InputError("DUMP", f"there is no folder {name!r}")
    if not (is_dump(folder) or folder.name.startswith("graph_")):
        why = f"{name!r} holds no graph_NNN folder: name what was given to the option dump"
        raise InputError("DUMP", why)
    return folder
