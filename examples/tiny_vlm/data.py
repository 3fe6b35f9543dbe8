"""Scenes of real handwritten digits on a photograph, and questions about their contents.

Digits are scikit-learn's ``load_digits`` (8x8 scans), backgrounds its two sample photographs. The
splits share no digits, and the test split has a separate photograph, so no pixel of a test scene
was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from world import COARSE, COLOURS, EMPTY_COLOUR, EMPTY_DIGIT, NAMES, NUMBERS, PATCH, World

# Questions of each type in one training sequence; a scene with fewer contributes all it has.
QUESTIONS = {
    "cell": 2,
    "code": 2,
    "corner": 1,
    "colour": 2,
    "colour_code": 4,
    "colour_of": 2,
    "digit_of": 2,
    "count": 1,
    "largest": 1,
    "read": 2,
}
TYPES = list(QUESTIONS)


@dataclass(frozen=True)
class Scene:
    """One image and its labels.

    image: [side, side, 3] uint8.  digits, colours, sizes: [cells, cells] int64, -1 in empty cells;
    sizes in pixels.  patch_digit, patch_colour: [grid, grid] int64.  anchor: [grid, grid] int64, 1
    at the patch that holds a digit's centre of mass.
    """

    world: World
    image: NDArray[np.uint8]
    digits: NDArray[np.int64]
    colours: NDArray[np.int64]
    sizes: NDArray[np.int64]
    patch_digit: NDArray[np.int64]
    patch_colour: NDArray[np.int64]
    anchor: NDArray[np.int64]


class Scenes:
    """An endless supply of scenes from one split, "train", "validation" or "test"."""

    def __init__(
        self,
        split: str,
        seed: int | list[int],
        fewest: int = 1,
        most: int | None = None,
        world: World = COARSE,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.world = world
        self.fewest, self.most = fewest, world.most if most is None else most
        self.plain = 0.0  # share of scenes on a plain colour instead of a photograph
        self._train = split == "train"
        china, flower = map(Image.fromarray, load_sample_images().images)
        self._photograph = flower if split == "test" else china
        scans, values = _digits(split)
        self._drawn = {size: _draw(scans, size, 8 if self._train else 1) for size in world.sizes}
        values = np.repeat(values, 8 if self._train else 1)
        self._of = [np.flatnonzero(values == digit) for digit in range(10)]

    def scene(self) -> Scene:
        """Draw a new scene."""
        canvas, world = self._background(), self.world
        shape, patches = (world.cells,) * 2, (world.grid,) * 2
        digits, colours, sizes = (np.full(shape, -1) for _ in range(3))
        patch_digit = np.full(patches, EMPTY_DIGIT)
        patch_colour = np.full(patches, EMPTY_COLOUR)
        anchor = np.zeros(patches, np.int64)
        cells = self._cells()
        drawn = self._sizes(len(cells))
        # Some scenes use few digits and colours, so that both repeat.
        some_digits = self.rng.permutation(10)[: self.rng.integers(2, 11)]
        some_colours = self.rng.permutation(len(NAMES))[: self.rng.integers(2, 8)]
        for number, (row, column) in enumerate(cells):
            digit, colour = self.rng.choice(some_digits), self.rng.choice(some_colours)
            size = drawn[number] if drawn else self._size()
            ink = self._paint(canvas, row, column, digit, colour, size)
            digits[row, column], colours[row, column], sizes[row, column] = digit, colour, size
            at = _patches(world, row, column)
            inked = ink.reshape(world.cell, PATCH, world.cell, PATCH).sum((1, 3)) > 1.5
            patch_digit[at][inked], patch_colour[at][inked] = digit, colour
            along = np.arange(world.cell * PATCH)
            centre = [int((ink.sum(1 - a) @ along) / ink.sum()) // PATCH for a in (0, 1)]
            anchor[at][tuple(centre)] = 1
        image = (canvas * 255).round().astype(np.uint8)
        return Scene(world, image, digits, colours, sizes, patch_digit, patch_colour, anchor)

    def _size(self, most: int | None = None) -> int:
        """Pixels along a digit's side."""
        return self.world.sizes[self.rng.integers(len(self.world.sizes) if most is None else most)]

    def _sizes(self, count: int) -> list[int]:
        """Sizes of all digits of a scene with one outstanding digit, or an empty list."""
        if not self.world.outstanding or self.rng.random() >= self.world.outstanding:
            return []
        largest = int(self.rng.integers(2, len(self.world.sizes)))
        sizes = [self._size(largest - 1) for _ in range(count)]
        sizes[self.rng.integers(count)] = self.world.sizes[largest]
        return sizes

    def _background(self) -> NDArray[np.float32]:
        """[side, side, 3] float32 in [0, 0.55]: a dimmed crop, or one dark colour."""
        rng, all_pixels = self.rng, self.world.side
        if rng.random() < self.plain:
            return np.full(
                (all_pixels, all_pixels, 3), rng.random(3) * rng.uniform(0, 0.25), np.float32
            )
        width, height = self._photograph.size
        side = int(rng.integers(all_pixels, 320))
        left, top = rng.integers(width - side), rng.integers(height - side)
        box = (left, top, left + side, top + side)
        crop = self._photograph.resize((all_pixels, all_pixels), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(crop)[:, :: rng.choice([-1, 1])]
        if self._train:  # augment: one photograph is little data
            pixels = pixels[:: rng.choice([-1, 1]), :, rng.permutation(3)]
        return pixels.astype(np.float32) * (rng.uniform(0.15, 0.55) / 255)

    def _cells(self) -> list[tuple[int, int]]:
        """Occupied cells; in most scenes one row has three or more, for "read" questions."""
        rng, side = self.rng, self.world.cells
        count = int(rng.integers(self.fewest, self.most + 1))
        cells = rng.permutation(side * side)
        if count >= 3 and rng.random() < 0.6:
            row = rng.integers(side) * side + rng.permutation(side)[: rng.integers(3, side + 1)]
            cells = np.concatenate([row, cells[~np.isin(cells, row)]])
        return [divmod(int(cell), side) for cell in cells[:count]]

    def _paint(
        self, canvas: NDArray[np.float32], row: int, column: int, digit: int, colour: int, size: int
    ) -> NDArray[np.float32]:
        """Paint a digit somewhere in its cell; returns its ink there, in [0, 1]."""
        rng, side = self.rng, self.world.cell * PATCH
        ink = np.zeros((side, side), np.float32)
        top, left = rng.integers(side - size + 1, size=2)
        drawn = self._drawn[size][rng.choice(self._of[digit])]
        ink[top : top + size, left : left + size] = drawn / np.float32(255)
        tint = np.array(COLOURS[NAMES[colour]]) * rng.uniform(0.75, 1) + rng.uniform(-0.06, 0.06, 3)
        first = self.world.margin * PATCH
        cell = canvas[first + row * side :, first + column * side :][:side, :side]
        cell += ink[..., None] * (tint.clip(0, 1).astype(np.float32) - cell)
        return ink


def _digits(split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scans [n, 8, 8] in [0, 1] and their values [n]: 75% train, 5% validation, 20% test."""
    data = load_digits()
    index = np.arange(len(data.target))
    rest, test = train_test_split(index, test_size=0.2, random_state=0, stratify=data.target)
    train, validation = train_test_split(
        rest, test_size=0.0625, random_state=0, stratify=data.target[rest]
    )
    chosen = {"train": train, "validation": validation, "test": test}[split]
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen]


def _draw(scans: NDArray[np.float32], size: int, variants: int) -> NDArray[np.uint8]:
    """Resize the scans to ``size`` pixels; several variants are rotated, sheared and scaled."""
    images = torch.from_numpy(scans).repeat_interleave(variants, 0)[:, None]
    count = len(images)
    vary = torch.rand(4, count, generator=torch.Generator().manual_seed(size)) - 0.5
    angle, shear, tall, wide = vary * (variants > 1) * torch.tensor([[0.45], [0.4], [0.24], [0.24]])
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    first = torch.stack([cos * (1 + wide), shear - sin, zero], 1)
    second = torch.stack([sin, cos * (1 + tall), zero], 1)
    where = F.affine_grid(torch.stack([first, second], 1), [count, 1, size, size], False)
    drawn = F.grid_sample(images, where, align_corners=False)[:, 0]
    return (drawn.clamp(0, 1) * 255).byte().numpy()


def _patches(world: World, row: int, column: int) -> tuple[slice, slice]:
    """The patches of a cell."""
    top, left = (world.margin + world.cell * number for number in (row, column))
    return slice(top, top + world.cell), slice(left, left + world.cell)


def questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """All questions with a unique answer, by type, as (question, answer) of words."""
    asked: dict[str, list[tuple[str, str]]] = {kind: [] for kind in TYPES}
    last = scene.world.cells - 1
    places = [(int(row), int(column)) for row, column in np.argwhere(scene.digits >= 0)]
    digits = [str(scene.digits[place]) for place in places]
    colours = [NAMES[scene.colours[place]] for place in places]
    for (row, column), digit, colour in zip(places, digits, colours, strict=True):
        words = f"at row {NUMBERS[row]} column {NUMBERS[column]} ?"
        code = scene.world.code(row, column)
        asked["cell"].append((f"digit {words}", digit))
        asked["colour"].append((f"colour {words}", colour))
        asked["code"].append((f"what digit at {code}", digit))
        asked["colour_code"].append((f"what colour at {code}", colour))
        if row in (0, last) and column in (0, last):
            side = f"{'bottom' if row else 'top'} {'right' if column else 'left'}"
            asked["corner"].append((f"digit at {side} ?", digit))
        if digits.count(digit) == 1:
            asked["colour_of"].append((f"which colour is the {digit} ?", colour))
        if colours.count(colour) == 1:
            asked["digit_of"].append((f"which digit is {colour} ?", digit))
    asked["count"].append(("how many digits ?", str(len(places))))
    order = sorted(places, key=lambda place: scene.sizes[place])
    if len(order) == 1 or scene.sizes[order[-1]] >= scene.sizes[order[-2]] + 4:
        asked["largest"].append(("which digit is largest ?", str(scene.digits[order[-1]])))
    for row in range(scene.world.cells):
        found = [str(digit) for digit in scene.digits[row] if digit >= 0]
        if len(found) > 1:
            asked["read"].append((f"read row {NUMBERS[row]} ?", " ".join(found)))
    return asked


def sample(scene: Scene, rng: np.random.Generator, times: int = 1) -> list[tuple[str, str, str]]:
    """(type, question, answer) in random order, up to ``times`` the numbers of QUESTIONS."""
    picked = [
        (kind, *asked[i])
        for kind, asked in questions(scene).items()
        for i in rng.permutation(len(asked))[: times * QUESTIONS[kind]]
    ]
    return [picked[i] for i in rng.permutation(len(picked))]
