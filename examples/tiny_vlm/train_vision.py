"""Phase one: teach the vision tower what each patch belongs to, by heads that are then dropped.

    python examples/tiny_vlm/train_vision.py FOLDER

or, on two cores, ``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 ...``, which is faster than one
process with two threads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from data import CELL, EMPTY_COLOUR, EMPTY_DIGIT, GRID, PATCH, Scene, Scenes
from model import MEAN, STD, WIDTH, build, patch_features, quadrant_features, quadrants
from torch import Tensor, nn
from training import Run, arguments

SCENES = 8  # per step and process
QUADRANTS = 0.6  # share of the time; accuracy on whole images lags until the rest
LABELS = {"digit": 11, "colour": 8, "anchor": 2, "row": 4, "column": 4}
# An empty patch teaches little, and where a patch lies is soon learnt.
EMPTY_WEIGHT, PLACE_WEIGHT = 0.15, 0.1


class Labeller(nn.Module):
    """The tower with one linear head for each label of a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = [build()]  # in a list: only the tower's weights are this module's
        self.tower = self.model[0].model.vision_tower
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, sum(LABELS.values()))

    def forward(self, pixels: Tensor, whole: bool) -> dict[str, Tensor]:
        """Logits of each label: pixels [B, 3, 96, 96] to [patches of all, classes]."""
        features = (patch_features if whole else quadrant_features)(self.model[0], pixels)
        logits = self.heads(self.norm(features)).float().flatten(0, 1)
        return dict(zip(LABELS, logits.split(list(LABELS.values()), -1), strict=True))


def pixels(scenes: list[Scene]) -> Tensor:
    """Normalised pixels, [B, 3, 96, 96] float32."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return (images.float() / 255 - MEAN) / STD


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Labels of each patch, [B, 576] int64."""
    cell = torch.arange(GRID) // (CELL // PATCH)
    place = {"row": cell[:, None].expand(GRID, GRID), "column": cell.expand(GRID, GRID)}
    told = {
        "digit": [scene.patch_digit for scene in scenes],
        "colour": [scene.patch_colour for scene in scenes],
        "anchor": [scene.anchor for scene in scenes],
    }
    stacked = {name: torch.from_numpy(np.stack(grids)) for name, grids in told.items()}
    stacked |= {name: grid.expand(len(scenes), GRID, GRID) for name, grid in place.items()}
    return {name: label.flatten(1) for name, label in stacked.items()}


def loss(logits: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Sum of the labels' cross-entropies."""
    weight = {name: torch.ones(size) for name, size in LABELS.items()}
    weight["digit"][EMPTY_DIGIT] = weight["colour"][EMPTY_COLOUR] = EMPTY_WEIGHT
    weight["anchor"][0] = 0.3
    each = {n: F.cross_entropy(logits[n], target[n].flatten(), weight[n]) for n in LABELS}
    return sum(each.values()) - (1 - PLACE_WEIGHT) * (each["row"] + each["column"])


@torch.no_grad()
def accuracy(labeller: Labeller, scenes: list[Scene]) -> dict[str, float]:
    """Of digit and colour on a digit's patches, of digit at its anchor; false digits elsewhere."""
    target = {name: label.flatten() for name, label in labels(scenes).items()}
    parts = [labeller(pixels(scenes[i : i + 16]), True) for i in range(0, len(scenes), 16)]
    found = {name: torch.cat([part[name] for part in parts]).argmax(-1) for name in LABELS}
    inked, anchor = target["digit"] != EMPTY_DIGIT, target["anchor"] == 1
    right = {name: found[name] == target[name] for name in LABELS}
    rates = {
        "digit": right["digit"][inked],
        "digit_at_anchor": right["digit"][anchor],
        "colour": right["colour"][inked],
        "false_digit": ~right["digit"][~inked],
    }
    return {name: round(rate.float().mean().item(), 4) for name, rate in rates.items()}


def main() -> None:
    """Train, in the time given."""
    args = arguments(__doc__, minutes=25)
    torch.manual_seed(args.seed)
    labeller = Labeller()
    run = Run("vision", args.folder, labeller, args.minutes, rate=2e-3)
    seed = [args.seed, run.rank, run.steps]
    supply = Scenes("train", seed, fewest=14, most=16)  # nearly every cell: more digits to learn
    held_out = Scenes("validation", 1)
    validation = [held_out.scene() for _ in range(128)]
    while run.share < 1:
        supply.plain = 0.15 * max(0, 1 - 2 * run.share)
        scenes = [supply.scene() for _ in range(SCENES)]
        whole, target = run.share > QUADRANTS, labels(scenes)
        if not whole:
            target = {name: quadrants(label) for name, label in target.items()}
        with torch.autocast("cpu", torch.bfloat16):
            logits = labeller(pixels(scenes), whole)
        run.step(loss(logits, target))
        if run.due(60):
            run.record(**accuracy(labeller, validation))
    run.record(**accuracy(labeller, validation))
    run.close()


if __name__ == "__main__":
    main()
