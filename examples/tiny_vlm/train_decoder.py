"""Phase two: teach projector and decoder to answer, the tower frozen.

    python examples/tiny_vlm/train_decoder.py FOLDER

after train_vision.py in the same folder; torchrun as there.  First with a quarter of the vision
tokens, at their own positions, which is four times faster: in two steps of three those of all
digits and some of the background, in one of three a random quarter.  Then with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import BOS, EMPTY_DIGIT, EOS, GRID, TYPES, VOCABULARY, Scene, Scenes, sample
from model import WINDOW, build, patch_features
from torch import Tensor
from train_vision import pixels
from training import Run, arguments
from transformers import LlavaForConditionalGeneration

TOKENS = GRID * GRID
SPARSE = TOKENS // 4
SCENES = 8  # per step and process
REPLAYS = 3  # uses of a scene, each with new questions: the tower costs as much as the rest
POOL = 1500  # scenes
SPARSE_TEXT, FULL_TEXT = 128, 256  # words in a sequence


class Supply:
    """Scenes with the tower's features, each used about REPLAYS times."""

    def __init__(self, model: LlavaForConditionalGeneration, scenes: Scenes) -> None:
        self.model, self.scenes = model, scenes
        self._pool: list[tuple[Scene, Tensor]] = []
        self._made = self._used = 0

    def make(self, count: int) -> list[tuple[Scene, Tensor]]:
        """New scenes with their features, [576, 128] bfloat16."""
        made = [self.scenes.scene() for _ in range(count)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return list(zip(made, patch_features(self.model, pixels(made)).bfloat16(), strict=True))

    def batch(self) -> list[tuple[Scene, Tensor]]:
        """Scenes for one step."""
        if len(self._pool) < 64 or self._made * REPLAYS <= self._used:
            self._pool = (self._pool + self.make(16))[-POOL:]
            self._made += 16
        self._used += SCENES
        return [self._pool[i] for i in self.scenes.rng.integers(len(self._pool), size=SCENES)]


@dataclass(frozen=True)
class Text:
    """Several questions a scene, one after the other in one sequence; all [B, T] int64.

    target: the next word where it is part of an answer, else -100.  block: the question's number,
    -1 at pads.  position: within the question.  kind: index into TYPES.
    """

    words: Tensor
    target: Tensor
    block: Tensor
    position: Tensor
    kind: Tensor


def pack(scenes: list[Scene], rng: np.random.Generator, length: int, times: int) -> Text:
    """Questions on each scene, as many as fit."""
    shape = (len(scenes), length)
    words, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    target, block, kind = np.full(shape, -100), np.full(shape, -1), np.full(shape, -1)
    for row, scene in enumerate(scenes):
        start = 0
        for number, (name, question, answer) in enumerate(sample(scene, rng, times)):
            asked = [VOCABULARY[word] for word in question.split()]
            wanted = [*(VOCABULARY[word] for word in answer.split()), EOS]
            size = len(asked) + len(wanted) - 1  # <eos> is only predicted
            if start + size > length:
                continue
            at = slice(start, start + size)
            words[row, at] = (asked + wanted)[:-1]
            target[row, start + len(asked) - 1 : start + size] = wanted
            block[row, at], kind[row, at] = number, TYPES.index(name)
            position[row, at] = np.arange(size)
            start += size
    return Text(*map(torch.from_numpy, (words, target, block, position, kind)))


def keep(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    """Vision tokens of the sparse part, [B, SPARSE] int64 ascending."""
    score = torch.from_numpy(rng.random((len(scenes), TOKENS)))
    if rng.random() < 2 / 3:
        inked = np.stack([scene.patch_digit != EMPTY_DIGIT for scene in scenes])
        score += torch.from_numpy(inked).flatten(1)
    return score.topk(SPARSE).indices.sort().values


def answer_logits(
    model: LlavaForConditionalGeneration, features: Tensor, kept: Tensor | None, text: Text
) -> Tensor:
    """Logits wherever ``text.target`` has a word, [words, vocabulary].

    features: [B, 576, 128].  kept: [B, K] int64, or None for all.  Each question sees the image
    and itself, at the positions it would have alone, so this is what a prompt of one question is.
    """
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    batch = len(features)
    if kept is None:
        kept = torch.arange(TOKENS).expand(batch, -1)
    picked = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    image = projector(picked).float()  # so that autocast leaves what layers add up in float32
    first = torch.full((batch, 1), BOS)
    word = decoder.embed_tokens(torch.cat([first, text.words], 1))
    hidden = torch.cat([word[:, :1], image, word[:, 1:]], 1)
    place = torch.cat([first * 0, kept + 1, text.position + TOKENS + 1], 1)
    prefix = 1 + kept.shape[1]
    sees = torch.ones(batch, hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    sees[:, prefix:, prefix:] &= text.block[:, :, None] == text.block[:, None]
    near = sees & (place[:, :, None] - place[:, None] < WINDOW)
    mask = {
        name: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
        for name, seen in (("full_attention", sees), ("sliding_attention", near))
    }
    output = decoder(inputs_embeds=hidden, attention_mask=mask, position_ids=place, use_cache=False)
    return model.lm_head(output.last_hidden_state[:, prefix:][text.target >= 0]).float()


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, scenes: list[tuple[Scene, Tensor]], sparse: bool
) -> dict[str, float]:
    """Share of answers that are right in every word, by type of question."""
    rng = np.random.default_rng(1)  # the same questions every time
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for i in range(0, len(scenes), 8):
        some, features = zip(*scenes[i : i + 8], strict=True)
        text = pack(list(some), rng, FULL_TEXT, 1)
        kept = keep(list(some), rng) if sparse else None
        logits = answer_logits(model, torch.stack(features).float(), kept, text)
        wrong = torch.zeros_like(text.target, dtype=torch.bool)
        wrong[text.target >= 0] = logits.argmax(-1) != text.target[text.target >= 0]
        for row in range(len(some)):
            for number in text.block[row].unique():
                if number >= 0:
                    at = text.block[row] == number
                    kind = TYPES[text.kind[row][at][0]]
                    right[kind].append(not wrong[row][at].any())
    return {kind: round(float(np.mean(answers)), 3) for kind, answers in right.items()}


def prepare(folder: Path, seed: int) -> LlavaForConditionalGeneration:
    """The model with the trained tower, frozen, and a projector scaled to what the tower gives."""
    torch.manual_seed(seed)
    model = build()
    trained = torch.load(folder / "vision.pt")["module"]
    tower = {k.removeprefix("tower."): v for k, v in trained.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(tower)
    model.model.vision_tower.requires_grad_(False)
    features = torch.stack([f for _, f in Supply(model, Scenes("train", 2)).make(8)]).float()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_1.weight /= features.square().mean().sqrt()
        projector.linear_2.weight *= 0.3
    return model


def main() -> None:
    """Train, in the time given."""
    args = arguments(__doc__, sparse=35, full=34)
    model = prepare(args.folder, args.seed)
    run = Run("decoder", args.folder, model, args.sparse + args.full, rate=1.5e-3)
    supply = Supply(model, Scenes("train", [args.seed, 1, run.rank, run.steps]))
    validation = Supply(model, Scenes("validation", 2)).make(64)
    while run.share < 1:
        sparse = run.elapsed < 60 * args.sparse
        scenes, features = zip(*supply.batch(), strict=True)
        length, times = (SPARSE_TEXT, 1) if sparse else (FULL_TEXT, 2)
        text = pack(list(scenes), supply.scenes.rng, length, times)
        kept = keep(list(scenes), supply.scenes.rng) if sparse else None
        with torch.autocast("cpu", torch.bfloat16):
            logits = answer_logits(model, torch.stack(features).float(), kept, text)
        run.step(F.cross_entropy(logits, text.target[text.target >= 0]))
        if run.due(120):
            run.record(sparse=sparse, **accuracy(model, validation, sparse))
    run.record(sparse=False, **accuracy(model, validation, False))
    run.close()


if __name__ == "__main__":
    main()
