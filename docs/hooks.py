"""MkDocs hooks: links out of docs/ become names of files, and roles of docstrings plain names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

_ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([\w/.-]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page whose links to other files of the repository are text and path instead."""
    return _OUTSIDE.sub(_named, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A page without the roles that stand before names in docstrings."""
    return _ROLE.sub("", html)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    # A link that leads nowhere stays one, and fails the build.
    return f"{text} (`{path}`)" if (ROOT / path).exists() else link[0]
