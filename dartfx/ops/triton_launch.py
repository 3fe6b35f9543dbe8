"""Which selections the Triton kernels support, and their launches.  Imports Triton lazily."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from dartfx.selection.batch_rule import Size, kept_length, smaller
from dartfx.selection.dart import EPS

__all__ = ["MAX_PIVOTS", "MAX_SEQUENCE", "select", "unavailable", "unsupported"]

# Ranking by counting compares every position with every other: its cost grows with S squared.
MAX_SEQUENCE = 32_768
# The rounds hold one rank per position and pivot in registers.
MAX_PIVOTS = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Launch: TypeAlias = Callable[..., None]
"""(kernel, grid, *arguments, **constants): runs the kernel, or makes it a node of a graph."""

# Tiles, in elements. Few positions per program of the two kernels that read keys and hidden
# states, so that a prompt of a few hundred tokens already occupies every core of a large device.
_NORM_TILE = (4, 1024)  # positions, channels
_COSINE_TILE = (8, 128, 8)  # positions, channels, pivots
_SCAN_TILE = 512
_RANK_TILE = (32, 128)  # positions, those they are compared with at a time
_SELECT_TILE = 4096  # positions times pivots
_SELECT_WARPS = 16  # with 8, Triton 3.9 spills for sm_90


def unsupported(
    hidden: Tensor, keys: Tensor, selector: str, pivot_image_tokens: int, pivot_text_tokens: int
) -> str:
    """What about a valid selection the kernels do not serve, or an empty string.

    A symbolic S gets one guard, at the limit.
    """
    if selector != "dart":
        return f"selector is {selector!r}, and the kernels implement 'dart'"
    for name, tensor in (("hidden", hidden), ("keys", keys)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, and the kernels take float32, float16 and bfloat16"
    if guard_or_false(hidden.shape[1] > MAX_SEQUENCE):
        return f"hidden holds S = {hidden.shape[1]} positions, and the limit is {MAX_SEQUENCE}"
    if pivot_image_tokens + pivot_text_tokens > MAX_PIVOTS:
        return (
            f"pivot_image_tokens + pivot_text_tokens is {pivot_image_tokens + pivot_text_tokens}, "
            f"and the limit is {MAX_PIVOTS}"
        )
    return ""


def unavailable(device: torch.device) -> str:
    """Why kernels cannot run on ``device``, or an empty string. ROCm devices are "cuda" too."""
    if not _triton_installed():
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and _interpreted()):
        return ""
    return f"Triton serves CUDA and ROCm devices, not {device.type}"


@functools.cache
def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def _interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on CPU tensors."""
    from triton import JITFunction

    from dartfx.ops import triton_kernels

    return not isinstance(triton_kernels.rank, JITFunction)


def select(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
    *,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
    traced: bool,
) -> tuple[Tensor, Tensor]:
    """keep_idx [B, S'] int64 and fits [B] bool: whether each row's text and budget fit into S'.

    Arguments are those of the operator, checked.  traced: launches become nodes of the graph that
    is being traced, for a compiler to schedule; otherwise the kernels run now.
    """
    launch = _in_graph if traced else _now
    batch, sequence, _ = hidden.shape
    slots = pivot_image_tokens + pivot_text_tokens
    length = kept_length(sequence, vision_tokens, retain)
    vision_mask = vision_mask.contiguous()
    valid_mask = None if valid_mask is None else valid_mask.contiguous()
    counts = {"IMAGE": pivot_image_tokens, "TEXT": pivot_text_tokens}
    new = functools.partial(torch.empty, device=hidden.device)

    pivots = new((batch, 2, max(1, *counts.values())), dtype=torch.int32)
    norms = _key_norms(launch, keys, vision_mask, valid_mask, pivots)
    norm_ranks = _ranks(launch, norms, pivots)
    order = ranks = norm_ranks  # not read if there are no pivots
    if slots:
        order = new((batch, slots, length), dtype=torch.int32)
        scores = _cosines(launch, hidden, vision_mask, pivots, **counts)
        ranks = _ranks(launch, scores, order)

    lengths = sequence, length, smaller(retain, vision_tokens)
    ranked = norm_ranks, pivots, ranks, order
    return _keep(launch, vision_mask, valid_mask, ranked, lengths, counts)


def _keep(
    launch: Launch,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    ranked: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: tuple[Size, Size, Size],
    counts: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """The results of :func:`select`.

    ranked: ranks by key norm, pivots, ranks and orders by similarity; lengths: S, S' and R; counts:
    image and text pivots.
    """
    from dartfx.ops import triton_kernels

    batch, device = vision_mask.shape[0], vision_mask.device
    keep_idx = torch.empty((batch, lengths[1]), dtype=torch.int64, device=device)
    fits = torch.empty((batch,), dtype=torch.bool, device=device)
    columns = max(8, _power_of_two(sum(counts.values())))
    launch(
        triton_kernels.select,
        (batch,),
        *(vision_mask, vision_mask if valid_mask is None else valid_mask),
        *(*ranked, keep_idx, fits),
        *lengths,
        **counts,
        CAPACITY=ranked[1].shape[2],
        HAS_VALID=valid_mask is not None,
        SLOTS=columns,
        BLOCK=_SELECT_TILE // columns,
        num_warps=_SELECT_WARPS,
    )
    return keep_idx, fits


def _key_norms(
    launch: Launch, keys: Tensor, vision_mask: Tensor, valid_mask: Tensor | None, pivots: Tensor
) -> Tensor:
    """Scores of all possible pivots [B, 2, S] float32; clears ``pivots``."""
    from dartfx.ops import triton_kernels

    batch, heads, sequence, head = keys.shape
    norms = torch.empty((batch, 2, sequence), dtype=torch.float32, device=keys.device)
    block, channels = _NORM_TILE
    launch(
        triton_kernels.key_norms,
        (batch, _tiles(sequence, block)),
        *(keys, vision_mask, vision_mask if valid_mask is None else valid_mask, norms, pivots),
        *(sequence, *keys.stride()),
        CHANNELS=heads * head,
        HEAD=head,
        HAS_VALID=valid_mask is not None,
        CAPACITY=pivots.shape[2],
        BLOCK_S=block,
        BLOCK_C=min(channels, _power_of_two(heads * head)),
        SCAN=_SCAN_TILE,
    )
    return norms


def _ranks(launch: Launch, scores: Tensor, order: Tensor) -> Tensor:
    """Ranks by scores [B, L, S], [B, S, L] int32; fills ``order`` [B, L, capacity] int32."""
    from dartfx.ops import triton_kernels

    batch, rankings, sequence = scores.shape
    ranks = torch.empty((batch, sequence, rankings), dtype=torch.int32, device=scores.device)
    block, others = _RANK_TILE
    launch(
        triton_kernels.rank,
        (batch, rankings, _tiles(sequence, block)),
        *(scores, ranks, order, sequence, order.shape[2]),
        BLOCK=block,
        OTHERS=others,
    )
    return ranks


def _cosines(
    launch: Launch, hidden: Tensor, vision_mask: Tensor, pivots: Tensor, **counts: int
) -> Tensor:
    """Similarities of the vision tokens to the pivots [B, P, S] float32."""
    from dartfx.ops import triton_kernels

    batch, sequence, width = hidden.shape
    slots = sum(counts.values())
    scores = torch.empty((batch, slots, sequence), dtype=torch.float32, device=hidden.device)
    block, channels, per_program = _COSINE_TILE
    per_program = min(per_program, _power_of_two(slots))
    launch(
        triton_kernels.cosines,
        (batch, _tiles(sequence, block), _tiles(slots, per_program)),
        *(hidden, vision_mask, pivots, scores, sequence, *hidden.stride()),
        **counts,
        CAPACITY=pivots.shape[2],
        D=width,
        EPS=EPS,
        BLOCK_S=block,
        BLOCK_D=min(channels, _power_of_two(width)),
        BLOCK_P=per_program,
    )
    return scores


def _tiles(count: Size, tile: int) -> Size:
    return (count + tile - 1) // tile


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count`` and 1."""
    return 1 << max(count - 1, 0).bit_length()


def _now(kernel: Any, grid: tuple[Size, ...], *args: Any, **constants: Any) -> None:
    # Triton launches on the current device, whichever device the tensors are on.
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*args, **constants)


def _in_graph(kernel: Any, grid: tuple[Size, ...], *args: Any, **constants: Any) -> None:
    torch.library.wrap_triton(kernel)[grid](*args, **constants)
