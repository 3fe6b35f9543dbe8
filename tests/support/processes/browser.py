"""Headless Chromium for tests of pages: where it is, and how it runs without network or profile."""

from __future__ import annotations

import shutil
import subprocess
import tempfile

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium (apt-get install chromium)"
)

# As root it refuses its sandbox; the rest keeps it from asking its maker for updates.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def dom(url: str, *flags: str) -> str:
    """The elements of a page after its script ran, in a browser that knows no other page."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *_FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
