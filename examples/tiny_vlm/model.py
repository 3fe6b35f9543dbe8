"""The models of variants.py, initialised to learn fast, and their towers' features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from variants import VARIANTS, Variant
from world import PATCH

FREQUENCIES = 16  # of the position code, along each axis
MEAN, STD = 0.25, 0.3  # of a pixel in [0, 1]
MATRICES = ("_proj", "mlp", "linear", "feed_forward")  # in the names of weights
WRITES = ("out_proj", "o_proj", "fc2", "down_proj", "w2")  # of those that write residuals

# Initial attention offsets of the heads in vision layers 0 to 2, in patches (down, right).
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)


@torch.no_grad()
def build(variant: Variant = VARIANTS["coarse"]) -> LlavaForConditionalGeneration:
    """Build the untrained model; reproducible by ``torch.manual_seed``."""
    model = LlavaForConditionalGeneration(variant.configuration())
    # transformers' default 0.02 is too small at these widths.
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and any(part in name for part in MATRICES):
            gain = 0.5 if any(part in name for part in WRITES) else 0.8
            nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[1]))
        elif name.endswith("conv.conv.weight"):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
    tower, classes = model.model.vision_tower, variant.class_tokens
    code, omega = _position_code(variant.world.grid, variant.width)
    positions, patches = tower.embeddings.position_embedding, tower.embeddings.patch_embedding
    positions.weight[:classes], positions.weight[classes:] = 0, code
    nn.init.normal_(patches.weight, std=1 / math.sqrt(3 * PATCH * PATCH))
    patches.weight[-4 * FREQUENCIES :] = 0  # these channels hold the position code
    if patches.bias is not None:
        patches.bias.zero_()
    for layer, offsets in zip(tower.encoder.layers, OFFSETS, strict=False):
        _look_at_neighbours(layer.self_attn, offsets, omega)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The projector's input: the tower's output without a class token.

    pixels: [B, 3, side, side] float, normalised; positions are interpolated if the side is not the
    variant's.  Returns [B, patches, width].
    """
    tower = model.model.vision_tower
    other = pixels.shape[-1] != tower.config.image_size
    given = {"interpolate_pos_encoding": True} if other else {}
    hidden = tower(pixels, output_hidden_states=True, **given).hidden_states[-1]
    return hidden[:, hidden.shape[1] - (pixels.shape[-1] // PATCH) ** 2 :]


def quadrant_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's output for each quadrant of the images separately, at its true positions.

    pixels: [B, 3, side, side].  Returns [4 B, patches / 4, width].  A digit lies in one quadrant,
    and attention over a quarter of the tokens costs a quarter.
    """
    tower = model.model.vision_tower
    table = tower.embeddings.position_embedding.weight
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    quarters = quadrants(patches + table[-patches.shape[1] :])
    if not hasattr(tower, "pre_layrnorm"):  # SigLIP
        return tower.encoder(inputs_embeds=quarters).last_hidden_state
    first = (tower.embeddings.class_embedding + table[0]).expand(len(quarters), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first.to(quarters.dtype), quarters], 1))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]


def quadrants(x: Tensor) -> Tensor:
    """Rearrange [B, patches, ...] to [4 B, patches / 4, ...], quadrant by quadrant."""
    half, rest = math.isqrt(x.shape[1]) // 2, x.shape[2:]
    x = x.reshape(len(x), 2, half, 2, half, *rest).transpose(2, 3)
    return x.reshape(-1, half * half, *rest)


def _position_code(grid: int, width: int) -> tuple[Tensor, Tensor]:
    """Position code [patches, width] in the last 64 channels: sine and cosine of y, then x.

    Also returns the frequencies, [16], with periods from 4 to 64 patches.
    """
    omega = 2 * math.pi / (4 * 16 ** torch.linspace(0, 1, FREQUENCIES))
    angle = torch.arange(grid)[:, None] * omega
    wave = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # [grid, 32]
    code = torch.zeros(grid, grid, width)
    code[..., -4 * FREQUENCIES : -2 * FREQUENCIES] = wave[:, None]
    code[..., -2 * FREQUENCIES :] = wave
    return code.flatten(0, 1), omega


def _look_at_neighbours(attention: nn.Module, offsets: tuple[tuple[int, int], ...], omega: Tensor):
    """Initialise each head to attend to the patch at its offset.

    In a sine and cosine code a shift is a rotation of each pair of channels, so the query's weights
    are the key's, rotated.
    """
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query *= 0.3
    key *= 0.3
    strength = 1.3
    width, channels = query.shape[1], attention.head_dim
    pairs = channels // 4  # for each axis
    used = torch.linspace(0, FREQUENCIES - 1, pairs).round().long().tolist()
    for head, offset in enumerate(offsets):
        for axis, shift in enumerate(offset):
            first = width - (4 - 2 * axis) * FREQUENCIES
            for j, frequency in enumerate(used):
                row = head * channels + axis * 2 * pairs + 2 * j
                column = first + 2 * frequency
                theta = omega[frequency] * shift
                turn = torch.stack([theta.cos(), theta.sin(), -theta.sin(), theta.cos()])
                pair = slice(row, row + 2), slice(column, column + 2)
                key[pair] += strength * torch.eye(2)
                query[pair] += strength * turn.view(2, 2)
