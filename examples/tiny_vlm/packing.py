"""Packs several questions per image into one sequence, with attention that separates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data import TYPES, Scene, sample
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from variants import WINDOW, WINDOWED
from world import BOS, EMPTY_DIGIT, EOS


@dataclass(frozen=True)
class Text:
    """Several questions per scene, concatenated into one sequence; [B, T] int64.

    words: negative values are copies of the last vision tokens, -1 for the last.  block: the
    question's number, -1 at pads.  position: within the question.  kind: index into TYPES, -1 at
    pads and copies.  at: flat indices in B * T where the next word is part of an answer, [answers]
    int64, computed here to avoid a device synchronisation.  target: that next word, [answers].
    """

    words: Any
    block: Any
    position: Any
    kind: Any
    at: Any
    target: Any

    def to(self, device: torch.device | str) -> Text:
        """Move to the device as tensors."""
        given = (getattr(self, field.name) for field in fields(self))
        return Text(*(torch.as_tensor(value).to(device, non_blocking=True) for value in given))


def pack(
    scenes: Sequence[Scene], rng: np.random.Generator, length: int, times: int, copies: int = 0
) -> Text:
    """Pack as many questions on each scene as fit, as arrays.

    copies: number of last vision tokens repeated in front of each question.  A convolution then
    sees the same tokens before the question as in a prompt of that question alone.
    """
    shape = (len(scenes), length)
    words, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    target, block, kind = np.full(shape, -100), np.full(shape, -1), np.full(shape, -1)
    for row, scene in enumerate(scenes):
        start, vocabulary = 0, scene.world.vocabulary
        for number, (name, question, answer) in enumerate(sample(scene, rng, times)):
            asked = [vocabulary[word] for word in question.split()]
            wanted = [*(vocabulary[word] for word in answer.split()), EOS]
            size = len(asked) + len(wanted) - 1  # <eos> is only predicted
            if start + copies + size > length:
                continue
            block[row, start : start + copies + size] = number
            words[row, start : start + copies] = np.arange(-copies, 0)
            start += copies
            at = slice(start, start + size)
            words[row, at] = (asked + wanted)[:-1]
            target[row, start + len(asked) - 1 : start + size] = wanted
            kind[row, at] = TYPES.index(name)
            position[row, at] = np.arange(size)
            start += size
    answers = np.flatnonzero(target >= 0)
    return Text(words, block, position, kind, answers, target.reshape(-1)[answers])


def keep(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose a quarter of the vision tokens, [B, tokens / 4] ascending.

    In two of three cases those of all digits and some background, else a random quarter.
    """
    tokens = scenes[0].world.tokens
    score = rng.random((len(scenes), tokens))
    if rng.random() < 2 / 3:
        inked = np.stack([scene.patch_digit != EMPTY_DIGIT for scene in scenes])
        score += inked.reshape(len(scenes), tokens)
    kept = np.argpartition(-score, tokens // 4, axis=1)[:, : tokens // 4]
    return np.sort(kept, axis=1)


class Masks(NamedTuple):
    """Attention masks for a sequence of image and text.

    image: number of positions of <bos> and the image, which are causal.  text: mask of the text's
    queries, [B, 1, T, S] bool.  near: [B, 1, S, S] bool, in layers with a window.
    """

    image: int
    text: Tensor
    near: Tensor


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Masks,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface, with masks for packed questions."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if module.layer_idx < WINDOWED:
        mask = attention_mask.near
        made = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    else:
        image = attention_mask.image
        head = [x[:, :, :image] for x in (query, key, value)]
        made = torch.cat(
            [
                F.scaled_dot_product_attention(*head, is_causal=True, scale=scaling),
                F.scaled_dot_product_attention(
                    query[:, :, image:], key, value, attention_mask.text, scale=scaling
                ),
            ],
            2,
        )
    return made.transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def answer_logits(model: Any, features: Tensor, kept: Tensor | None, text: Text) -> Tensor:
    """Logits of the words in ``text.target``, [answers, vocabulary].

    features: [B, tokens, width].  kept: [B, K] int64, or None for all.  The decoder's attention
    must be "packed".  Each question sees the image and itself, at the positions it would have
    alone, so this is equivalent to a prompt of one question.
    """
    decoder, projector = model.model.language_model, model.model.multi_modal_projector
    batch, tokens = features.shape[:2]
    first = torch.full((batch, 1), BOS, device=features.device)
    if kept is None:
        kept = torch.arange(tokens, device=features.device).expand(batch, -1)
    picked = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    image = projector(picked).float()  # so that autocast keeps the residual stream in float32
    copy = text.words < 0
    source = torch.where(copy, text.words + kept.shape[1], 0)  # of copies, among the kept
    word = decoder.embed_tokens(torch.cat([first, text.words.clamp(min=0)], 1))
    copied = image.gather(1, source[..., None].expand(-1, -1, image.shape[-1]))
    words = torch.where(copy[..., None], copied, word[:, 1:])
    hidden = torch.cat([word[:, :1], image, words], 1)
    place = torch.where(copy, kept.gather(1, source) + 1, text.position + tokens + 1)
    place = torch.cat([first * 0, kept + 1, place], 1)
    masks = _masks(place, text.block, copy, source)
    output = decoder(
        inputs_embeds=hidden,
        attention_mask={"full_attention": masks, "sliding_attention": masks, "conv": None},
        position_ids=place,
        use_cache=False,
    )
    hidden = output.last_hidden_state[:, masks.image :].flatten(0, 1)
    return model.lm_head(hidden[text.at]).float()


def _masks(place: Tensor, block: Tensor, copy: Tensor, source: Tensor) -> Masks:
    """Questions see the image and themselves; a copy sees what its vision token sees."""
    length = block.shape[1]
    image = place.shape[1] - length
    last = torch.where(copy, source + 1, image - 1)
    column = torch.arange(image, device=place.device)
    before = column <= last[..., None]
    own = (block[:, :, None] == block[:, None]) & ~copy[:, :, None] & ~copy[:, None]
    text = torch.cat([before, own.tril()], -1)
    causal = (column[:, None] >= column).expand(len(place), -1, -1)
    sees = torch.cat([F.pad(causal, (0, length)), text], 1)
    short = place.int()
    near = sees & (short[:, :, None] - short[:, None] < WINDOW)
    return Masks(image, text[:, None], near[:, None])
