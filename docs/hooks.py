"""MkDocs hook: what a page links to outside of docs/ is named, since the site does not hold it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([\w/.-]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page whose links to other files of the repository are text and path instead."""
    return _OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    # A link that leads nowhere stays one, and fails the build.
    return f"{text} (`{path}`)" if (ROOT / path).exists() else link[0]
