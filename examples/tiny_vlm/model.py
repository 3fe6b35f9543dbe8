"""The model: stock ``LlavaForConditionalGeneration``, small, initialised so that it learns fast.

576 vision tokens as LLaVA-1.5. Decoder layers 0 and 1 attend within a window of 8 tokens: in so
small a decoder the question otherwise reads the whole image in these two layers, and dropping every
vision token before layer 2 costs nothing, which would make any comparison of selectors void.
"""

from __future__ import annotations

import math

import torch
from data import BOS, EOS, GRID, IMAGE, PAD, PATCH, SIDE, WORDS
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

WIDTH, HEADS, INNER = 128, 4, 384
VISION_LAYERS, DECODER_LAYERS = 4, 8
WINDOW, WINDOWED = 8, 2  # tokens, layers
FREQUENCIES = 16  # of the position code, along each axis
MEAN, STD = 0.25, 0.3  # of a pixel in [0, 1]

# Where the heads of vision layers 0 to 2 look at first, as (down, right) patches from their own.
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)


def configuration() -> LlavaConfig:
    """The configuration of the model."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    full = DECODER_LAYERS - WINDOWED
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * WINDOWED + ["full_attention"] * full,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


@torch.no_grad()
def build() -> LlavaForConditionalGeneration:
    """The model, untrained; follows ``torch.manual_seed``."""
    model = LlavaForConditionalGeneration(configuration())
    # transformers' own 0.02 is too little at width 128.
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and any(part in name for part in ("_proj", "mlp", "linear")):
            writes = any(part in name for part in ("out_proj", "o_proj", "fc2", "down_proj"))
            nn.init.normal_(weight, std=(0.5 if writes else 0.8) / math.sqrt(weight.shape[1]))
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
    tower = model.model.vision_tower
    code, omega = _position_code()
    positions, patches = tower.embeddings.position_embedding, tower.embeddings.patch_embedding
    positions.weight[0], positions.weight[1:] = 0, code
    nn.init.normal_(patches.weight, std=1 / math.sqrt(3 * PATCH * PATCH))
    patches.weight[-4 * FREQUENCIES :] = 0  # these channels are the position's
    for layer, offsets in zip(tower.encoder.layers, OFFSETS, strict=False):
        _look_at_neighbours(layer.self_attn, offsets, omega)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector gets: the tower's output without the class token.

    pixels: [B, 3, 96, 96] float, normalised.  Returns [B, 576, 128].
    """
    tower = model.model.vision_tower
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def quadrant_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's output for each quadrant of the images on its own, at its own positions.

    pixels: [B, 3, 96, 96].  Returns [4 B, 144, 128].  A digit lies in one quadrant, and attention
    over 144 tokens costs a quarter.
    """
    tower = model.model.vision_tower
    table = tower.embeddings.position_embedding.weight
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + table[1:]
    quarters = quadrants(patches)
    first = (tower.embeddings.class_embedding + table[0]).expand(len(quarters), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first.to(quarters.dtype), quarters], 1))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]


def quadrants(x: Tensor) -> Tensor:
    """[B, 576, ...] to [4 B, 144, ...], quadrant by quadrant."""
    half, rest = GRID // 2, x.shape[2:]
    x = x.reshape(len(x), 2, half, 2, half, *rest).transpose(2, 3)
    return x.reshape(-1, half * half, *rest)


def _position_code() -> tuple[Tensor, Tensor]:
    """Code of each patch, [576, 128], in the last 64 channels: sine and cosine of y, then of x.

    Also the frequencies, [16], with periods from 4 to 64 patches.
    """
    omega = 2 * math.pi / (4 * 16 ** torch.linspace(0, 1, FREQUENCIES))
    angle = torch.arange(GRID)[:, None] * omega
    wave = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # [24, 32]
    code = torch.zeros(GRID, GRID, WIDTH)
    code[..., -4 * FREQUENCIES : -2 * FREQUENCIES] = wave[:, None]
    code[..., -2 * FREQUENCIES :] = wave
    return code.flatten(0, 1), omega


def _look_at_neighbours(attention: nn.Module, offsets: tuple[tuple[int, int], ...], omega: Tensor):
    """Each head starts by attending to the patch at its offset.

    With a sine and cosine code a shift is a rotation of each pair of channels, so the query's
    weights are the key's, rotated.
    """
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query *= 0.3
    key *= 0.3
    strength = 1.3
    channels = WIDTH // HEADS
    pairs = channels // 4  # for each axis
    used = torch.linspace(0, FREQUENCIES - 1, pairs).round().long().tolist()
    for head, offset in enumerate(offsets):
        for axis, shift in enumerate(offset):
            first = WIDTH - (4 - 2 * axis) * FREQUENCIES
            for j, frequency in enumerate(used):
                row = head * channels + axis * 2 * pairs + 2 * j
                column = first + 2 * frequency
                theta = omega[frequency] * shift
                turn = torch.stack([theta.cos(), theta.sin(), -theta.sin(), theta.cos()])
                pair = slice(row, row + 2), slice(column, column + 2)
                key[pair] += strength * torch.eye(2)
                query[pair] += strength * turn.view(2, 2)
