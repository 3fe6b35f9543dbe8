"""Layouts inferred from a call's arguments, against transformers' own handling of pixels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

import dartfx
from dartfx.token_map.infer_layout import LayoutUnknown, from_inputs
from dartfx.token_map.kept_tokens import KeptTokens
from dartfx.token_map.layout import Cell, Layout
from dartfx.tools.zoo.registry import load
from tests.support.slow import slow


def pixels(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# One of transformers' models of overview and tiles each: class, its side of an overview in tokens,
# pixels of a tile, grids of tiles.
TILED = {
    "next": (LlavaNextModel, 24, 336, [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]),
    "onevision": (LlavaOnevisionModel, 27, 384, [(i, j) for i in range(1, 7) for j in range(1, 7)]),
}


def packed_places(name: str, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Row and column of each token of an image by transformers' packing code; the grid of tiles.

    Features hold their own place, in the overview or in all tiles.
    """
    model, side, tile, grids = TILED[name]
    pins = [(high * tile, wide * tile) for high, wide in grids]
    best = select_best_resolution(size, pins)
    high, wide = best[0] // tile, best[1] // tile
    rows, columns = torch.meshgrid(
        torch.arange(high * side), torch.arange(wide * side), indexing="ij"
    )
    fine = torch.stack([rows, columns], -1).view(high, side, wide, side, 2).transpose(1, 2)
    whole = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    features = torch.cat([whole.view(1, -1, 2), fine.reshape(high * wide, -1, 2)]).float()
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=tile // side),
        image_grid_pinpoints=pins,
    )
    more = {"vision_feature_select_strategy": "full"} if name == "next" else {}
    (found,), _ = model.pack_image_features(
        SimpleNamespace(config=config), [features], torch.tensor([size]),
        image_newline=torch.tensor([-1.0, -1.0]), **more,
    )  # fmt: skip
    return found, (high, wide)


def packed(name: str, size: tuple[int, int]) -> tuple[list[Cell | None], int]:
    """Where each token of an image lies, and how many tiles it has.

    Tokens between places (scaled down) are left to count.
    """
    found, (high, wide) = packed_places(name, size)
    side = TILED[name][1]
    first = found[side * side]
    cells: list[Cell | None] = []
    for i, (row, column) in enumerate(found.tolist()):
        if row < 0:
            cells.append(None)
        elif i < side * side:
            cells.append(Cell(0, int(row), int(column)))
        else:
            cells.append(Cell(1, round(row - float(first[0])), round(column - float(first[1]))))
    return cells, high * wide


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("next", (336, 336)), ("next", (480, 640)), ("next", (1000, 300)), ("next", (333, 1024)),
        ("next", (670, 675)), ("onevision", (384, 700)), ("onevision", (500, 1100)),
        ("onevision", (384, 384)),
    ],
)  # fmt: skip
def test_overview_and_tiles_lie_as_the_model_packs_them(name: str, size: tuple[int, int]) -> None:
    cells, tiles = packed(name, size)
    tile = TILED[name][2]
    inputs = {"pixel_values": pixels(1, tiles + 1, 3, tile, tile), "image_sizes": [size]}
    (layout,) = from_inputs(inputs, [len(cells)])
    assert list(layout.cells) == cells


@pytest.mark.parametrize(
    ("name", "size"), [("next", (480, 640)), ("next", (1000, 300)), ("onevision", (500, 1100))]
)
def test_tokens_are_of_the_tile_that_the_model_took_them_from(
    name: str, size: tuple[int, int]
) -> None:
    """Padding is cut off in front of the first tile's tokens, too."""
    found, (high, wide) = packed_places(name, size)
    side, pixel = TILED[name][1:3]
    inputs = {"pixel_values": pixels(1, high * wide + 1, 3, pixel, pixel), "image_sizes": [size]}
    (layout,) = from_inputs(inputs, [len(found)])
    wanted = [
        int(row // side * wide + column // side)
        for row, column in found[side * side :].tolist()
        if row >= 0
    ]
    assert layout.tiling is not None
    tiles = [layout.tiling.of(cell) for cell in layout.cells if cell is not None]
    assert tiles == [None] * side * side + wanted
    kept = KeptTokens(0, 0, tuple(range(len(found))), tuple(range(len(found))), layout=layout)
    assert kept.by_tile == tuple(wanted.count(tile) for tile in range(high * wide))
    assert str(kept).endswith(f"by tile: {', '.join(map(str, kept.by_tile))}")


def test_a_grid_that_was_scaled_down_ends_its_rows_where_the_model_does() -> None:
    cells, tiles = packed("onevision", (1900, 2000))
    assert tiles > 9
    inputs = {"pixel_values": pixels(1, tiles + 1, 3, 384, 384), "image_sizes": [(1900, 2000)]}
    (layout,) = from_inputs(inputs, [len(cells)])
    assert layout.tiling is None
    assert [i for i, c in enumerate(layout.cells) if c is None] == [
        i for i, c in enumerate(cells) if c is None
    ]


def test_many_images_are_never_laid_out_wrongly() -> None:
    generator, refused = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        size = tuple(torch.randint(100, 2000, (2,), generator=generator).tolist())
        cells, tiles = packed("next", size)
        inputs = {"pixel_values": pixels(1, tiles + 1, 3, 336, 336), "image_sizes": [size]}
        try:
            assert list(from_inputs(inputs, [len(cells)])[0].cells) == cells
        except ValueError:
            refused += 1
    assert refused < 3


def test_padded_tiles_of_several_images_and_one_without() -> None:
    sizes = [(480, 640), (1000, 300)]
    found = [packed("next", size) for size in sizes]
    inputs = {
        "pixel_values": pixels(2, 1 + max(tiles for _, tiles in found), 3, 336, 336),
        "image_sizes": torch.tensor(sizes),
    }
    layouts = from_inputs(inputs, [len(cells) for cells, _ in found])
    assert [list(x.cells) for x in layouts] == [cells for cells, _ in found]
    alone = {"pixel_values": pixels(1, 1, 3, 384, 384), "image_sizes": [(500, 400)]}
    assert from_inputs(alone, [730])[0].cells == (*Layout.grid(27, 27).cells, None)


def test_patches_lie_as_the_processor_cuts_them() -> None:
    """An image of one grey per merged cell: what is in each token's patches says where it is."""
    from transformers import Qwen2VLImageProcessorPil

    rows, columns, cell = 4, 6, 28
    greys = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns) * 10
    picture = Image.fromarray(np.kron(greys, np.ones((cell, cell), np.uint8))).convert("RGB")
    processor = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, min_pixels=1, max_pixels=1 << 20,
        do_normalize=False, do_rescale=False,
    )  # fmt: skip
    made = processor([picture, picture], return_tensors="pt")
    shown = made["pixel_values"].float().reshape(2, rows * columns, -1).mean(-1) / 10
    layouts = from_inputs(made, [rows * columns] * 2)
    for layout, order in zip(layouts, shown.round().long().tolist(), strict=True):
        cells = [c for c in layout.cells if c is not None]
        assert [c.row * columns + c.column for c in cells] == order


def test_grids_of_videos_and_images_in_the_order_of_the_prompt() -> None:
    video = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
    assert from_inputs(video, [72]) == [Layout.grid(3, 4, 6)]
    assert from_inputs(video, [24, 24, 24]) == [Layout.grid(3, 4, 6)], "a text before each frame"
    both = video | {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 8]])}
    image, large, film = Layout.grid(1, 2, 2), Layout.grid(1, 4, 4), Layout.grid(3, 4, 6)
    assert from_inputs(both, [4, 72, 16]) == [image, film, large]
    assert from_inputs(both, [72, 4, 16]) == [film, image, large]
    unclear = {"image_grid_thw": [[1, 4, 8]], "video_grid_thw": [[2, 4, 4]]}
    with pytest.raises(ValueError, match="images and videos fit the prompt in 2 orders"):
        from_inputs(unclear, [8, 8])
    with pytest.raises(ValueError, match="grids of 288 patches do not explain 50 vision tokens"):
        from_inputs(video, [50])


def test_images_of_sizes_of_their_own() -> None:
    inputs = {"pixel_values": pixels(2, 3, 64, 96), "image_sizes": [(64, 96), (32, 48)]}
    # Each row of an image is a run of its own where a token ends it.
    runs = [6] * 4 + [3] * 2
    assert from_inputs(inputs, runs) == [Layout.grid(4, 6), Layout.grid(2, 3)]
    nested = inputs | {"image_sizes": torch.tensor([[(64, 96), (32, 48)]])}
    assert from_inputs(nested, runs) == from_inputs(inputs, runs)
    with pytest.raises(ValueError, match="do not end where runs"):
        from_inputs(inputs, [25, 5])
    with pytest.raises(ValueError, match="do not explain 29 vision tokens"):
        from_inputs(inputs, [29])


def test_images_of_one_size() -> None:
    assert (
        from_inputs({"pixel_values": pixels(2, 3, 384, 384)}, [729, 729])
        == [Layout.grid(27, 27)] * 2
    )
    assert from_inputs({"pixel_values": pixels(1, 3, 28, 56)}, [8]) == [Layout.grid(2, 4)]


def test_tiles_whose_numbers_the_processor_gives() -> None:
    inputs = {"pixel_values": pixels(1, 7, 3, 32, 32), "rows": [[2]], "cols": [[3]]}
    assert from_inputs(inputs, [4] * 7) == [Layout.tiles(2, 3, (2, 2))]
    plain = {"pixel_values": pixels(1, 8, 3, 32, 32), "rows": [[0, 2]], "cols": [[0, 3]]}
    assert from_inputs(plain, [4] * 8) == [Layout.grid(2, 2), Layout.tiles(2, 3, (2, 2))]


def test_frames_of_a_video() -> None:
    inputs = {"pixel_values_videos": pixels(2, 8, 3, 56, 56)}
    assert from_inputs(inputs, [128, 128]) == [Layout.grid(8, 4, 4)] * 2


@pytest.mark.parametrize(
    ("inputs", "runs", "because"),
    [
        # 32 squared, but of four tiles: a square would be a wrong place for every token.
        ({"pixel_values": pixels(4, 3, 448, 448)}, [1024], r"1 runs .* pixel_values \[4, 3, 448"),
        ({"pixel_values": pixels(1, 5, 3, 32, 32)}, [4] * 5, "may be 5 images or tiles of one"),
        ({"pixel_values": pixels(1, 3, 32, 32)}, [5], "1 runs of vision tokens"),
        ({"pixel_values_videos": pixels(1, 8, 3, 56, 56)}, [129], "129 tokens are no equal grids"),
        ({"pixel_values_videos": pixels(1, 8, 3, 56, 56)}, [16] * 8, "8 runs"),
        ({"pixel_values": pixels(1, 5, 3, 28, 28), "image_sizes": [(56, 56)]}, [24],
         r"2 sizes of overviews explain 24 tokens of an image of \(56, 56\)"),
        ({"pixel_values": pixels(1, 3, 28, 28), "pixel_values_videos": pixels(1, 2, 3, 28, 28)},
         [4, 8], "nothing says in which order"),
        ({"pixel_values": pixels(1, 7, 3, 32, 32), "rows": [[2]], "cols": [[2]]}, [4] * 7,
         "do not explain 28"),
    ],
)  # fmt: skip
def test_undetermined_layouts_are_refused(inputs: Any, runs: list[int], because: str) -> None:
    with pytest.raises(ValueError, match=f"is not known: .*{because}.*; name it: a grid"):
        from_inputs(inputs, runs)


@pytest.mark.parametrize("value", [None, [], [torch.zeros(3, 28, 28)]])
def test_no_argument_that_tells(value: Any) -> None:
    with pytest.raises(LayoutUnknown, match="no argument of this call"):
        from_inputs({"input_ids": torch.ones(1, 4), "pixel_values": value}, [4])


@pytest.mark.parametrize(("name", "layout"), [("llava", (4, 4)), *slow(("qwen2_5_vl", (1, 4, 4)))])
def test_explain_lays_tokens_out(name: str, layout: tuple[int, ...]) -> None:
    family = load(name, layers=3)
    inputs = family.make_inputs("two")
    found = dartfx.explain(family.model, **inputs, options={"retain_tokens": 6}, tokens=True)
    assert [k.layout for k in found.tokens] == [Layout.grid(*layout)] * 2
    assert dartfx.kept_tokens(inputs) == list(found.tokens)


def test_explain_says_when_it_cannot() -> None:
    family = load("llava_next", layers=3)
    found = dartfx.explain(
        family.model, **family.make_inputs(), options={"retain_tokens": 6}, tokens=True
    )
    assert [k.layout for k in found.tokens] == [None]
    assert "NOTE: the layout of the image's vision tokens is not known" in str(found)
    with pytest.raises(ValueError, match="how 24 vision tokens lie in the image is not known"):
        found.tokens[0].cells()
    assert len(found.tokens[0].cells(Layout.anyres((2, 2), (4, 4)))) == 6
