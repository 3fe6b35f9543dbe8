"""A model in a folder, and commands called on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from dartfx.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a 4 by 4 grid of vision tokens, saved as one downloads it, and an image."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import vlm
    finally:
        sys.path.remove(str(EXAMPLES))
    folder, size = tmp_path_factory.mktemp("model"), vlm.SIZES["tiny"]
    vlm.build_model(size, seed=3).save_pretrained(folder)
    vlm.build_processor(size).save_pretrained(folder)
    Image.effect_noise((56, 56), 80.0).save(folder / "image.png")
    return folder


def call(command: str, saved: Path, *more: str) -> int:
    image = str(saved / "image.png")
    return main([command, "--model", str(saved), "--image", image, "--retain-tokens", "6", *more])
