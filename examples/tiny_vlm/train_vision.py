"""Phase one: train the vision tower to label each patch, with heads that are then discarded.

    python examples/tiny_vlm/train_vision.py FOLDER

or, on two cores, ``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 ...``, faster than one process
with two threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from data import Scenes
from loading import Batch, Order, batches, make, tensors
from model import MEAN, STD, build, patch_features, quadrant_features, quadrants
from numpy.typing import NDArray
from torch import Tensor, nn
from training import DEVICE, Run, arguments, autocast
from variants import VARIANTS, Variant
from world import EMPTY_COLOUR, EMPTY_DIGIT

QUADRANTS = 0.6  # share of the time; accuracy on whole images lags until the rest
# Empty patches carry little signal, and a patch's location is learnt quickly.
EMPTY_WEIGHT, PLACE_WEIGHT = 0.15, 0.1


class Labeller(nn.Module):
    """The tower with one linear head per patch label."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.model = [build(variant)]  # in a list: only the tower's weights are this module's
        self.tower = self.model[0].model.vision_tower
        self.norm = nn.LayerNorm(variant.width)
        cells = variant.world.cells
        self.sizes = {"digit": 11, "colour": 8, "anchor": 2, "row": cells, "column": cells}
        self.heads = nn.Linear(variant.width, sum(self.sizes.values()))

    def forward(self, pixels: Tensor, whole: bool) -> dict[str, Tensor]:
        """Logits per label: pixels [B, 3, side, side] to [all patches, classes]."""
        features = (patch_features if whole else quadrant_features)(self.model[0], pixels)
        logits = self.heads(self.norm(features)).float().flatten(0, 1)
        return dict(zip(self.sizes, logits.split(list(self.sizes.values()), -1), strict=True))


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Normalised pixels of [B, side, side, 3] uint8: [B, 3, side, side] float32."""
    given = torch.from_numpy(images).to(DEVICE, non_blocking=True).permute(0, 3, 1, 2)
    return (given.float() / 255 - MEAN) / STD


def loss(logits: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Sum of the labels' cross-entropies."""
    weight = {n: torch.ones(logit.shape[-1]) for n, logit in logits.items()}
    weight["digit"][EMPTY_DIGIT] = weight["colour"][EMPTY_COLOUR] = EMPTY_WEIGHT
    weight["anchor"][0] = 0.3
    each = {
        n: F.cross_entropy(logit, target[n].flatten(), weight[n].to(logit.device))
        for n, logit in logits.items()
    }
    return sum(each.values()) - (1 - PLACE_WEIGHT) * (each["row"] + each["column"])


@torch.no_grad()
def accuracy(labeller: Labeller, batch: Batch) -> dict[str, float]:
    """Accuracy of digit and colour on digit patches, digit at anchors; false digits elsewhere."""
    target = {name: label.flatten() for name, label in tensors(batch.labels, DEVICE).items()}
    with autocast():
        parts = [labeller(pixels(images), True) for images in _parts(batch.images)]
    found = {name: torch.cat([part[name] for part in parts]).argmax(-1) for name in target}
    inked, anchor = target["digit"] != EMPTY_DIGIT, target["anchor"] == 1
    right = {name: found[name] == target[name] for name in target}
    rates = {
        "digit": right["digit"][inked],
        "digit_at_anchor": right["digit"][anchor],
        "colour": right["colour"][inked],
        "false_digit": ~right["digit"][~inked],
        "place": (right["row"] & right["column"])[inked],
    }
    return {name: round(rate.float().mean().item(), 4) for name, rate in rates.items()}


def _parts(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (images[i : i + 16] for i in range(0, len(images), 16))


def main() -> None:
    """Train for the given time."""
    args = arguments(__doc__, rate=2e-3, minutes=25)
    torch.manual_seed(args.seed)
    variant = VARIANTS[args.variant]
    labeller = Labeller(variant).to(DEVICE)
    run = Run("vision", args, labeller, args.minutes)
    seed, cells = [args.seed, run.rank, run.steps], variant.world.cells**2
    # A digit in nearly every cell: more to learn from.
    common = {"scenes": args.scenes, "split": "train", "fewest": 7 * cells // 8, "most": cells}
    first = Order(variant, seed=[*seed, 0], plain=0.1, **common)
    then = Order(variant, seed=[*seed, 1], smaller=0.2, **common)
    supplies = [batches(order, args.workers) for order in (first, then)]
    held_out = Scenes("validation", 1, world=variant.world)
    validation = make(Order(variant, "validation", [1], args.validation), held_out)
    while run.share < 1:
        whole = run.share > QUADRANTS
        batch = next(supplies[whole])
        target = tensors(batch.labels, DEVICE)
        if not whole:
            target = {name: quadrants(label) for name, label in target.items()}
        with autocast():
            logits = labeller(pixels(batch.images), whole)
        run.step(loss(logits, target))
        if run.due():
            run.record(**accuracy(labeller, validation))
    run.record(**accuracy(labeller, validation))
    run.close()


if __name__ == "__main__":
    main()
