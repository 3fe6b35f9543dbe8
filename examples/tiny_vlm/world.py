"""The contents and size of a model's images, and the vocabulary of its questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

PATCH = 4  # pixels along a patch's side; a patch is a vision token
EMPTY_DIGIT, EMPTY_COLOUR = 10, 7  # labels of patches without a digit
COLOURS = {
    "red": (1, 0.12, 0.12),
    "green": (0.1, 0.9, 0.15),
    "blue": (0.2, 0.35, 1),
    "yellow": (1, 0.95, 0.1),
    "magenta": (1, 0.2, 1),
    "cyan": (0.1, 0.95, 1),
    "white": (1, 1, 1),
}
NAMES = list(COLOURS)
NUMBERS = ("one", "two", "three", "four", "five", "six")
PAD, BOS, EOS, IMAGE = range(4)
_GRAMMAR = (
    *("what", "digit", "is", "at", "row", "column", "top", "bottom", "left", "right", "how"),
    *("many", "digits", "which", "colour", "the", "read", "largest"),
)


@dataclass(frozen=True)
class World:
    """Square images with digits in a grid of cells.

    cells: per side.  cell: patches per cell side.  margin: patches around all cells.
    sizes: pixels per digit side.  most: digits per image.  outstanding: share of images with one
    digit larger than all others.
    """

    cells: int
    cell: int
    margin: int
    sizes: tuple[int, ...]
    most: int
    outstanding: float = 0.0

    @property
    def grid(self) -> int:
        """Patches along an image's side."""
        return self.cells * self.cell + 2 * self.margin

    @property
    def tokens(self) -> int:
        """Vision tokens of an image."""
        return self.grid**2

    @property
    def side(self) -> int:
        """Pixels along an image's side."""
        return self.grid * PATCH

    def code(self, row: int, column: int) -> str:
        """The single word for a cell."""
        return f"{'abcdef'[column]}{row + 1}"

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary."""
        return [
            *("<pad>", "<bos>", "<eos>", "<image>", "?"),
            *map(str, range(10)),
            *NAMES,
            *NUMBERS[: self.cells],
            *_GRAMMAR,
            *[self.code(row, column) for column in range(self.cells) for row in range(self.cells)],
            *map(str, range(10, self.most + 1)),
        ]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The index of each word."""
        return {word: i for i, word in enumerate(self.words)}


COARSE = World(cells=4, cell=6, margin=0, sizes=(10, 12, 14, 16, 18), most=9)
FINE = World(cells=6, cell=5, margin=1, sizes=(8, 10, 12, 14, 16), most=16, outstanding=0.4)
