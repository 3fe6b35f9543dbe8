"""Phase two: train projector and decoder to answer, with the tower frozen.

    python examples/tiny_vlm/train_decoder.py FOLDER

after train_vision.py in the same folder; torchrun as there.  First with a quarter of the vision
tokens, at their original positions, which is four times faster: in two of three steps those of all
digits and some background, otherwise a random quarter.  Then with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data import TYPES, Scenes
from loading import Batch, Order, batches, make
from model import build, patch_features
from packing import Text, answer_logits
from torch import Tensor
from train_vision import pixels
from training import DEVICE, Run, arguments, autocast
from transformers import LlavaForConditionalGeneration
from variants import VARIANTS, Variant

REPLAYS = 3  # uses of a scene, each with new questions: the tower costs as much as the rest
POOL = 8  # batches that are mixed
SPARSE_TEXT, FULL_TEXT = 128, 256  # words in a sequence
COPIED = 12, 24  # questions in them, roughly, each preceded by copies of vision tokens
HERE = Path(__file__).parent

Piece = tuple[Tensor, Tensor | None, Text]  # features, kept tokens, questions


def order(variant: Variant, split: str, seed: list[int], scenes: int, sparse: bool) -> Order:
    """The batches of the sparse or the full part of the training."""
    length, questions = (SPARSE_TEXT, COPIED[0]) if sparse else (FULL_TEXT, COPIED[1])
    length += questions * 2 * variant.convolutions
    training = split == "train"
    return Order(
        *(variant, split, seed, scenes),
        text=length,
        times=1 if sparse or not training else 2,
        packs=REPLAYS if training else 1,
        sparse=sparse,
        smaller=0.0 if sparse or not training else 0.15,
    )


def pieces(model: LlavaForConditionalGeneration, batch: Batch) -> list[Piece]:
    """Pair the batch's questions with the tower's features, [B, tokens, width] bfloat16."""
    with torch.no_grad(), autocast():
        features = patch_features(model, pixels(batch.images)).bfloat16()
    return [
        (features, None if kept is None else torch.from_numpy(kept).to(DEVICE), text.to(DEVICE))
        for kept, text in batch.texts
    ]


def mixed(
    model: LlavaForConditionalGeneration, supply: Iterator[Batch], rng: np.random.Generator
) -> Iterator[Piece]:
    """Yield all pieces of all batches, shuffled over several batches."""
    pool: list[list[Piece]] = []
    while True:
        while len(pool) < POOL:
            pool.append(pieces(model, next(supply)))
        chosen = int(rng.integers(len(pool)))
        yield pool[chosen].pop()
        if not pool[chosen]:
            pool.pop(chosen)


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, asked: list[Piece]) -> dict[str, float]:
    """Share of answers with every word correct, by type of question."""
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for features, kept, given in asked:
        with autocast():
            said = answer_logits(model, features.float(), kept, given).argmax(-1).cpu()
        text = given.to("cpu")
        wrong = torch.zeros_like(text.words, dtype=torch.bool)
        wrong.view(-1)[text.at] = said != text.target
        for row in range(len(wrong)):
            for number in text.block[row].unique():
                if number >= 0:
                    at = text.block[row] == number
                    right[TYPES[text.kind[row][at][-1]]].append(not wrong[row][at].any())
    return {kind: round(float(np.mean(answers)), 3) for kind, answers in right.items() if answers}


def prepare(variant: Variant, folder: Path, seed: int) -> LlavaForConditionalGeneration:
    """The model with the trained tower, frozen, and a projector scaled to the tower's output."""
    torch.manual_seed(seed)
    model = build(variant).to(DEVICE)
    model.model.language_model.set_attn_implementation("packed")
    tower: dict[str, Any]
    if variant.tower_of:
        trained = LlavaForConditionalGeneration.from_pretrained(HERE / variant.tower_of)
        tower = trained.model.vision_tower.float().state_dict()
    else:
        saved = torch.load(folder / "vision.pt", map_location=DEVICE)["module"]
        tower = {k.removeprefix("tower."): v for k, v in saved.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(tower)
    model.model.vision_tower.requires_grad_(False)
    scenes = Scenes("train", 2, world=variant.world)
    features = pieces(model, make(order(variant, "train", [2], 8, True), scenes))[0][0].float()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight /= features.square().mean().sqrt()
        projector.linear_2.weight *= 0.3
    return model


def main() -> None:
    """Train for the given time."""
    args = arguments(__doc__, rate=1.5e-3, sparse=35, full=34)
    variant = VARIANTS[args.variant]
    model = prepare(variant, args.folder, args.seed)
    run = Run("decoder", args, model, args.sparse + args.full)
    rng = np.random.default_rng([args.seed, 2, run.rank, run.steps])
    supplies, validation = {}, {}
    for sparse in (True, False):
        seed = [args.seed, 1, run.rank, run.steps, int(sparse)]
        supply = batches(order(variant, "train", seed, args.scenes, sparse), args.workers)
        supplies[sparse] = mixed(model, supply, rng)
        held_out = Scenes("validation", 2, world=variant.world)
        wanted = order(variant, "validation", [2], 8, sparse)
        some = (make(wanted, held_out) for _ in range(args.validation // 8))
        validation[sparse] = [piece for batch in some for piece in pieces(model, batch)]
    while run.share < 1:
        sparse = run.elapsed < 60 * args.sparse
        features, kept, text = next(supplies[sparse])
        with autocast():
            logits = answer_logits(model, features.float(), kept, text)
        run.step(F.cross_entropy(logits, text.target))
        if run.due():
            run.record(sparse=sparse, **accuracy(model, validation[sparse]))
    run.record(sparse=False, **accuracy(model, validation[False]))
    run.close()


if __name__ == "__main__":
    main()
