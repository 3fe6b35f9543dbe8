"""Batches of scenes, made by worker processes while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from data import Scene, Scenes
from numpy.typing import NDArray
from packing import Text, keep, pack
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from variants import Variant
from world import PATCH


@dataclass(frozen=True)
class Order:
    """What batches are wanted.

    scenes: in a batch.  fewest, most: digits in a scene.  plain: share of scenes on one colour.
    text: words in a sequence, 0 for none.  times: of the questions in data.QUESTIONS.  packs:
    sequences of each scene, each with questions of its own.  sparse: of a quarter of the tokens.
    smaller: share of batches of smaller pictures, where the variant has them.
    """

    variant: Variant
    split: str
    seed: list[int]
    scenes: int
    fewest: int = 1
    most: int | None = None
    plain: float = 0.0
    text: int = 0
    times: int = 1
    packs: int = 1
    sparse: bool = False
    smaller: float = 0.0


@dataclass(frozen=True)
class Batch:
    """images: [B, side, side, 3] uint8.  labels: of patches, [B, patches] uint8 each.  texts: with
    the tokens that are kept, [B, K] int64 or None.
    """

    images: NDArray[np.uint8]
    labels: dict[str, NDArray[np.uint8]]
    texts: list[tuple[NDArray[np.int64] | None, Text]] = field(default_factory=list)


class Batches(IterableDataset[Batch]):
    """An endless supply of what was ordered; every worker has scenes of its own."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Batch]:
        order, worker = self.order, get_worker_info()
        seed = order.seed if worker is None else [*order.seed, worker.id]
        scenes = Scenes(order.split, seed, order.fewest, order.most, order.variant.world)
        scenes.plain = order.plain
        for _ in count():
            yield make(order, scenes)


def batches(order: Order, workers: int) -> Iterator[Batch]:
    """As ordered, by so many worker processes, or with 0 by this one."""
    ahead = 4 if workers else None
    loader = DataLoader(Batches(order), batch_size=None, num_workers=workers, prefetch_factor=ahead)
    return iter(loader)


def make(order: Order, scenes: Scenes) -> Batch:
    """One batch."""
    some, rng = [scenes.scene() for _ in range(order.scenes)], scenes.rng
    grid = order.variant.world.grid
    if order.smaller and order.variant.grids and rng.random() < order.smaller:
        grid = int(rng.choice(order.variant.grids))
    copies = 2 * order.variant.convolutions
    texts = [
        (
            keep(some, rng) if order.sparse else None,
            pack(some, rng, order.text, order.times, copies),
        )
        for _ in range(order.packs if order.text else 0)
    ]
    return Batch(_images(some, grid), _labels(some, grid), texts)


def _images(scenes: list[Scene], grid: int) -> NDArray[np.uint8]:
    if grid == scenes[0].world.grid:
        return np.stack([scene.image for scene in scenes])
    size = (grid * PATCH, grid * PATCH)
    pictures = [Image.fromarray(scene.image) for scene in scenes]
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in pictures])


def _labels(scenes: list[Scene], grid: int) -> dict[str, NDArray[np.uint8]]:
    """Labels of each patch; in smaller pictures, those of what is in the patch's middle."""
    world = scenes[0].world
    cell = ((np.arange(world.grid) - world.margin) // world.cell).clip(0, world.cells - 1)
    where = ((np.arange(grid) + 0.5) * (world.grid / grid)).astype(int)
    shape = (len(scenes), world.grid, world.grid)
    whole = {
        "digit": np.stack([scene.patch_digit for scene in scenes]),
        "colour": np.stack([scene.patch_colour for scene in scenes]),
        "anchor": np.stack([scene.anchor for scene in scenes]),
        "row": np.broadcast_to(cell[:, None], shape),
        "column": np.broadcast_to(cell, shape),
    }
    smaller = {name: label[:, where][:, :, where] for name, label in whole.items()}
    return {n: label.reshape(len(scenes), -1).astype(np.uint8) for n, label in smaller.items()}


def tensors(labels: dict[str, NDArray[np.uint8]], device: torch.device) -> dict[str, torch.Tensor]:
    """Labels as int64 there."""
    return {n: torch.from_numpy(v).to(device, non_blocking=True).long() for n, v in labels.items()}
