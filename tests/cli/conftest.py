"""Runs commands of the command line on a saved model."""

from __future__ import annotations

from pathlib import Path

from dartfx.cli.main import main


def call(command: str, saved: Path, *more: str) -> int:
    image = str(saved / "image.png")
    return main([command, "--model", str(saved), "--image", image, "--retain-tokens", "6", *more])
