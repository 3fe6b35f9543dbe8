"""Which layout an image's vision tokens have, inferred from the arguments of the call.

Processors return sizes with the pixels: patch grids (``image_grid_thw``, ``video_grid_thw``),
``image_sizes``, numbers of tiles (``rows``, ``cols``), frames of ``pixel_values_videos``.  Many
models share these argument names; which model takes them does not matter.  What they do not
determine is refused with a reason, and the caller names the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import isqrt, sqrt
from typing import Any

from dartfx.token_map.layout import Layout, merged

__all__ = ["LayoutUnknown", "frame_lengths", "from_inputs"]

Size = tuple[int, int]

_NAME = "name it: a grid (rows, columns) or (frames, rows, columns), Layout.tiles or Layout.anyres"


class LayoutUnknown(ValueError):
    """No argument of the call gives the image's size."""


def from_inputs(inputs: Mapping[str, Any], runs: Sequence[int]) -> list[Layout]:
    """The layout of each image and video, in prompt order over all rows.

    inputs: the call's keyword arguments, as a processor made them.  runs: lengths of the unbroken
    runs of vision tokens in the same order: ``[len(k.positions) for k in dartfx.kept_tokens()]``.
    Tokens are assumed to be in row order, as patches do; the queries of a resampler have no cell in
    the image, and nothing here distinguishes them from patches.  Raises ValueError with what is
    missing, LayoutUnknown where no argument is known.
    """
    grids = [k for k in ("image_grid_thw", "video_grid_thw") if _is_readable(inputs, k)]
    pixels = [k for k in ("pixel_values", "pixel_values_videos") if _is_readable(inputs, k)]
    if grids:
        found = _patch_grids([_rows(inputs[k]) for k in grids], runs)
    elif len(pixels) == 2:
        raise _unknown("images and videos come in one call, and nothing says in which order")
    elif pixels == ["pixel_values_videos"]:
        found = _videos(inputs["pixel_values_videos"].shape, runs)
    elif not pixels:
        raise LayoutUnknown(f"no argument of this call gives image sizes; {_NAME}")
    elif _is_readable(inputs, "image_sizes"):
        found = _own_sizes(inputs["pixel_values"].shape, _rows(inputs["image_sizes"]), runs)
    else:
        tiles = [_flat(inputs.get(k)) for k in ("rows", "cols")]
        found = _views(inputs["pixel_values"].shape, tiles[0], tiles[1], runs)
    if [sum(len(x.cells) for x in found)] != [sum(runs)]:
        raise _unknown(f"the arguments' sizes do not explain {sum(runs)} vision tokens")
    return found


def frame_lengths(inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
    """How many vision tokens each frame of each video has, and each image; arguments as there.

    A token without a cell, as a newline, counts to the frame in front of it.  Raises ValueError.
    """
    lengths: list[int] = []
    for layout in from_inputs(inputs, runs):
        view = None
        for cell in layout.cells:
            if cell is not None and cell.view != view:
                view = cell.view
                lengths.append(0)
            lengths[-1] += 1
    return lengths


def _is_readable(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether an argument is present in a form that can be read."""
    value = inputs.get(name)
    return value is not None and len(value) > 0 and ("pixel" not in name or hasattr(value, "shape"))


def _unknown(because: str) -> ValueError:
    return ValueError(f"the layout of the image's vision tokens is not known: {because}; {_NAME}")


def _rows(value: Any) -> list[tuple[int, ...]]:
    """Sizes [images, numbers], or the same in one list per row of the batch."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    if hasattr(listed[0], "__len__") and hasattr(listed[0][0], "__len__"):
        listed = [size for row in listed for size in row]
    return [tuple(map(int, size)) for size in listed]


def _flat(value: Any) -> list[int]:
    """Numbers of tiles: [images], or one list of them per row of the batch."""
    listed = value.tolist() if hasattr(value, "tolist") else value or []
    return [int(n) for entry in listed for n in (entry if isinstance(entry, list) else [entry])]


def _patch_grids(kinds: list[list[tuple[int, ...]]], runs: Sequence[int]) -> list[Layout]:
    """Grids (frames, rows, columns) before patches were merged, of one or two kinds of media."""
    patches = sum(t * h * w for grids in kinds for t, h, w in grids)
    side = isqrt(patches // max(sum(runs), 1))
    if side < 1 or side * side * sum(runs) != patches:
        raise _unknown(f"grids of {patches} patches do not explain {sum(runs)} vision tokens")
    media = [[merged(g, g[0] * (g[1] // side) * (g[2] // side)) for g in grids] for grids in kinds]
    if len(media) == 1:
        return media[0]
    ends = {0, *accumulate(runs)}
    orders = {tuple(order) for order in _interleaved(media[0], media[1], 0, ends)}
    if len(orders) != 1:
        raise _unknown(f"images and videos fit the prompt in {len(orders)} orders")
    return list(orders.pop())


def _interleaved(
    images: list[Layout], videos: list[Layout], start: int, ends: set[int]
) -> Iterator[list[Layout]]:
    """The orders of two kinds of media in which each begins and ends with a run of tokens."""
    if not images and not videos:
        yield []
    for first, rest in ((images, (images[1:], videos)), (videos, (images, videos[1:]))):
        if first and (end := start + len(first[0].cells)) in ends:
            yield from ([first[0], *after] for after in _interleaved(*rest, end, ends))


def _videos(shape: Sequence[int], runs: Sequence[int]) -> list[Layout]:
    """Frames [videos, frames, channels, height, width], each a grid of tokens."""
    if len(shape) != 5 or len(runs) != shape[0]:
        raise _unknown(f"{len(runs)} runs of vision tokens for pixel_values_videos {list(shape)}")
    found = []
    for run in runs:
        grid = _grid(run // shape[1], (shape[3], shape[4])) if run % shape[1] == 0 else None
        if grid is None:
            raise _unknown(f"{run} tokens are no equal grids in {shape[1]} frames")
        found.append(Layout.grid(shape[1], *grid))
    return found


def _views(
    shape: Sequence[int], rows: list[int], columns: list[int], runs: Sequence[int]
) -> list[Layout]:
    """Images of one size [images, channels, height, width], or tiles [rows, tiles, ...]."""
    views = shape[0] if len(shape) == 4 else shape[0] * shape[1] if len(shape) == 5 else 0
    grids = [_grid(run, (shape[-2], shape[-1])) for run in runs] if views else []
    if views != len(runs) or None in grids:
        raise _unknown(f"{len(runs)} runs of vision tokens for pixel_values {list(shape)}")
    if len(shape) == 5 and shape[1] > 1 and not (rows and columns):
        raise _unknown(f"pixel_values {list(shape)} may be {shape[1]} images or tiles of one")
    if not rows:
        return [Layout.grid(*grid) for grid in grids if grid is not None]
    found: list[Layout] = []
    left = [grid for grid in grids if grid is not None]
    for high, wide in zip(rows, columns, strict=True):
        # An image that is not split counts no tile; a split one ends with an overview.
        tiles = high * wide + 1
        if len(left) < tiles or len(set(left[:tiles])) > 1:
            raise _unknown(f"{len(runs)} runs of vision tokens for tiles of {rows} by {columns}")
        tile = left[0]
        found.append(Layout.tiles(high, wide, tile) if tiles > 1 else Layout.grid(*tile))
        left = left[tiles:]
    return found


def _own_sizes(
    shape: Sequence[int], sizes: list[tuple[int, ...]], runs: Sequence[int]
) -> list[Layout]:
    """Images that each have a size (height, width): one patch size, or overview and tiles."""
    if len(shape) == 5:
        return _anyres(shape, [(h, w) for h, w in sizes], runs)
    area = sum(h * w for h, w in sizes)
    patch = isqrt(area // max(sum(runs), 1))
    if patch < 1 or patch**2 * sum(runs) != area or any(n % patch for s in sizes for n in s):
        raise _unknown(f"image_sizes {sizes} do not explain {sum(runs)} vision tokens")
    found = [Layout.grid(h // patch, w // patch) for h, w in sizes]
    if not set(accumulate(len(x.cells) for x in found)) <= set(accumulate(runs)):
        raise _unknown(f"image_sizes {sizes} do not end where runs of vision tokens do")
    return found


def _anyres(shape: Sequence[int], sizes: list[Size], runs: Sequence[int]) -> list[Layout]:
    """An overview and a grid of tiles [images, 1 + tiles, channels, side, side] for each image.

    The grid of tiles is not among the arguments; tiles, size and number of tokens leave few.
    """
    if not len(runs) == len(sizes) == shape[0]:
        raise _unknown(f"{len(runs)} runs of vision tokens for {len(sizes)} image_sizes")
    # The pixels of images with fewer tiles than the largest are padded.
    least = shape[1] if len(sizes) == 1 else 1
    found = []
    for run, size in zip(runs, sizes, strict=True):
        side = isqrt(run - 1)
        if shape[1] == 1 and side * side + 1 == run:  # an overview alone, and one newline
            found.append(Layout(((side, side),), (*Layout.grid(side, side).cells, None)))
            continue
        candidates = [
            (used, base, fine, tiles)
            for base in range(1, isqrt(run) + 1)
            if _is_grid_of(base, shape[-1])
            for used, fine, tiles in _fine_grids(run - base * base, base, size, (least, shape[1]))
        ]
        most = max((used for used, *_ in candidates), default=0)
        likely = [(base, fine, tiles) for used, base, fine, tiles in candidates if used == most]
        best = {(base, fine) for base, fine, _ in likely}
        bases = len({base for _, base, _, _ in candidates})
        if bases != 1 or len(best) != 1:
            count = f"{bases} sizes of overviews" if bases > 1 else f"{len(best)} AnyRes grids"
            raise _unknown(f"{count} explain {run} tokens of an image of {size}")
        ((base, fine),) = best
        cuts = {tiles for _, _, tiles in likely}
        tiles = cuts.pop() if len(cuts) == 1 else None
        found.append(Layout.anyres((base, base), fine, tiles=tiles))
    return found


def _fine_grids(
    tokens: int, base: int, size: Size, views: tuple[int, int]
) -> Iterator[tuple[float, Size, Size | None]]:
    """Grids of ``tokens`` tokens, each row ended by one more; the share of tiles they use; tiles.

    A grid is what the image covers of its tiles: padding above and below, or left and right, is
    cut off.  Larger ones may be scaled down to what the tiles hold, and tiles are then None.
    """
    for high in range(1, views[1]):
        for wide in range(1, (views[1] - 1) // high + 1):
            if high * wide + 1 < views[0]:
                continue
            rows, columns = _unpadded((high * base, wide * base), size)
            used = rows * columns / (high * wide * base * base)
            for most in range(1, high * wide + 1):
                ratio = sqrt(rows * columns / (most * base * base))
                fine = (
                    (rows, columns) if ratio <= 1.1 else (int(rows // ratio), int(columns // ratio))
                )
                if min(fine) > 0 and fine[0] * (fine[1] + 1) == tokens:
                    yield used, fine, (high, wide) if fine == (rows, columns) else None


def _unpadded(grid: Size, size: Size) -> Size:
    """The part of a grid that an image of this size covers when it is fitted into it."""
    (rows, columns), (height, width) = grid, size
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        return rows - (rows - covered) // 2 * 2, columns
    covered = int(round(width * (rows / height), 7))
    return rows, columns - (columns - covered) // 2 * 2


def _grid(tokens: int, size: Size) -> Size | None:
    """The rows and columns of square patches that cut an image of this size into ``tokens``."""
    rows = round(sqrt(tokens * size[0] / size[1]))
    columns = tokens // max(rows, 1)
    if rows < 1 or rows * columns != tokens:
        return None
    fits = any(size[0] // p == rows and size[1] // p == columns for p in range(1, min(size) + 1))
    return (rows, columns) if fits else None


def _is_grid_of(side: int, pixels: int) -> bool:
    return pixels // max(pixels // side, 1) == side
