"""Overlays: dropped patches dimmed, kept ones coloured by pivot, pivots framed, positions right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dartfx
from dartfx.token_map.kept_tokens import KeptTokens, Pick
from dartfx.token_map.layout import Layout

GREY = 200


def picture(wide: int = 60, high: int = 40) -> Image.Image:
    return Image.new("RGB", (wide, high), (GREY, GREY, GREY))


def record(tokens: int, picks: dict[int, list[int]], text: dict[int, list[int]]) -> KeptTokens:
    """Picks by index of an image pivot, and by position of a text pivot; tokens from position 5."""
    all_picks = [Pick(i + 5, i, tuple(k)) for i, k in picks.items()]
    all_picks += [Pick(p, None, tuple(k)) for p, k in text.items()]
    kept = sorted(i for pick in all_picks for i in pick.kept)
    positions = tuple(range(5, 5 + tokens))
    return KeptTokens(0, 0, positions, tuple(kept), tuple(all_picks), Layout.square(tokens))


def patch(image: Image.Image, layout: Layout, index: int) -> np.ndarray:
    """The mean colour inside one token's patch of a picture of one view."""
    cell = layout.cells[index]
    assert cell is not None
    rows, columns = layout.views[cell.view]
    pixels = np.asarray(image)
    high, wide = pixels.shape[0] / rows, pixels.shape[1] / columns
    y, x = round(high * (cell.row + 0.5)), round(wide * (cell.column + 0.5))
    return pixels[y - 2 : y + 2, x - 2 : x + 2].reshape(-1, 3).mean(0)


def test_dropped_is_dim_and_kept_has_the_colour_of_its_pivot() -> None:
    kept = record(12, {1: [1, 7], 4: [4]}, {30: [9, 10]})
    layout = Layout.grid(3, 4)
    drawn = dartfx.overlay(picture(), kept, (3, 4))
    colours = {i: tuple(patch(drawn, layout, i).round(0)) for i in range(12)}
    for i in range(12):
        if i not in kept.kept:
            assert max(colours[i]) < GREY / 3
        else:
            assert max(colours[i]) > GREY - 10
    assert colours[1] == colours[7]
    assert colours[9] == colours[10]
    assert len({colours[i] for i in (1, 4, 9)}) == 3, "one colour per pivot"
    assert len(set(colours[1])) > 1, "a colour, not a grey"


def test_pivots_are_framed() -> None:
    drawn = np.asarray(dartfx.overlay(picture(), record(16, {5: [5, 6]}, {})))
    high, wide = drawn.shape[0] // 4, drawn.shape[1] // 4
    assert (drawn[high, wide : 2 * wide] == 255).all(), "the upper edge of token 5"
    assert not (drawn[high, 2 * wide : 3 * wide] == 255).all(), "token 6 is kept, no pivot"


def test_views_stand_side_by_side() -> None:
    """An overview and tiles: one kept token in each; a newline token is nowhere."""
    layout = Layout.anyres((2, 2), (2, 2))
    kept = record(len(layout.cells), {0: [0]}, {40: [8, 9]})
    drawn = np.asarray(dartfx.overlay(picture(40, 40), kept, layout)).astype(int)
    wide = (drawn.shape[1] - 8) // 2
    assert (drawn[:, wide : wide + 8] == 255).all(), "the gap between the views"
    bright = (drawn.max(2) > GREY - 10).astype(int)
    view = bright[:, :wide], bright[:, wide + 8 :]
    half = wide // 2
    quarters = [[v[y : y + half, x : x + half].mean() > 0.9 for y in (0, half) for x in (0, half)]
                for v in view]  # fmt: skip
    assert quarters == [[True, False, False, False], [False, False, False, True]]


def test_video_frames_are_taken_evenly() -> None:
    frames = [Image.new("RGB", (20, 20), (shade, shade, shade)) for shade in (100, 110, 200, 210)]
    kept = record(8, {}, {30: list(range(8))})
    drawn = np.asarray(dartfx.overlay(frames, kept, (2, 2, 2))).astype(int)
    wide = (drawn.shape[1] - 8) // 2
    assert drawn[:, :wide].mean() < drawn[:, wide + 8 :].mean() - 40


def test_the_page_tells_of_every_token(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    picture().save(file)
    kept = record(16, {5: [5, 6]}, {30: [9]})
    html = dartfx.overlay_html(file, kept)
    titles = re.findall("<title>(token .*?)</title>", html)
    assert len(titles) == 16
    assert titles[5] == "token 5, row 1, column 1, pivot"
    assert titles[6] == "token 6, row 1, column 2, kept by the image pivot at position 10"
    assert titles[9] == "token 9, row 2, column 1, kept by the text pivot at position 30"
    assert titles[0] == "token 0, row 0, column 0, dropped"
    assert not re.search("https?://", html)


def test_a_grid_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the layout has 9 tokens, but the image 16"):
        dartfx.overlay(picture(), record(16, {}, {30: [1]}), (3, 3))
