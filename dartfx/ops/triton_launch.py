"""Which selections the Triton kernels support, and their launches.  Imports Triton lazily."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from dartfx.selection.batch_rule import Size, kept_length, smaller
from dartfx.selection.dart import EPS

__all__ = ["MAX_PIVOTS", "MAX_SEQUENCE", "select", "unavailable", "unsupported"]

# Ranking by counting compares every listed position with every other: its cost grows with the
# square of what is kept.
MAX_SEQUENCE = 32_768
# The rounds hold one rank per position and pivot in registers.
MAX_PIVOTS = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Launch: TypeAlias = Callable[..., None]
"""(kernel, grid, *arguments, **constants): runs the kernel, or makes it a node of a graph."""

# Tiles, in elements, as an H200 took them fastest (docs/kernel.md).
_NORM_TILE = (8, 512)  # positions, channels
_COSINE_TILE = (64, 256, 16)  # positions, bytes of channels, pivots
_COSINE_WARPS = 4
_SCAN_TILE = 2048
_SHORTLIST_TILE = 2048
_SHORTLIST_WARPS = 8
_RANK_TILE = (16, 128)  # positions, those they are compared with at a time
_SELECT_TILE = (4096, 2048, 1024)  # positions times pivots: of a round, of the result; masks
_SELECT_WARPS = 8


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
    lengths = kept_length(hidden.shape[1], vision_tokens, retain), smaller(retain, vision_tokens)
    vision_mask = vision_mask.contiguous()
    masks = vision_mask, vision_mask if valid_mask is None else valid_mask.contiguous()
    row = _Row(masks, valid_mask is not None, *lengths, pivot_image_tokens, pivot_text_tokens)

    norms, plan, fits = _key_norms(launch, keys, row)
    pivots, _, _ = _shortlist(launch, norms, plan, row.capacity, PIVOTS=True)
    codes, ranks = _cosines(launch, hidden, row, norms, plan, pivots)
    order = _ranks(launch, *_shortlist(launch, codes, plan, row.length, PIVOTS=False), ranks)
    return _kept(launch, row, plan, pivots, ranks, order), fits


class _Row(NamedTuple):
    """What the launches share: masks [B, S], S', min(R, N), and the numbers of pivots."""

    masks: tuple[Tensor, Tensor]
    has_valid: bool
    length: Size
    retain: Size
    image: int
    text: int

    @property
    def slots(self) -> int:
        """Rankings of vision tokens: one without any pivot."""
        return max(1, self.image + self.text)

    @property
    def capacity(self) -> int:
        """The most pivots of one kind, at least one."""
        return max(1, self.image, self.text)


def _key_norms(launch: Launch, keys: Tensor, row: _Row) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of all possible pivots [B, 2, S], the plan [B, PLAN], fits [B] bool."""
    from dartfx.ops import triton_kernels

    batch, heads, sequence, head = keys.shape
    new = functools.partial(torch.empty, dtype=torch.int32, device=keys.device)
    codes, plan = new((batch, 2, sequence)), new((batch, triton_kernels.PLAN.value))
    fits = torch.empty((batch,), dtype=torch.bool, device=keys.device)
    block, channels = _NORM_TILE
    launch(
        triton_kernels.key_norms,
        (batch, _tiles(sequence, block)),
        *(keys, *row.masks, codes, plan, fits),
        *(sequence, row.length, row.retain, *keys.stride()),
        IMAGE=row.image,
        TEXT=row.text,
        CHANNELS=heads * head,
        HEAD=head,
        HAS_VALID=row.has_valid,
        BLOCK_S=block,
        BLOCK_C=min(channels, _power_of_two(heads * head)),
        SCAN=_SCAN_TILE,
    )
    return codes, plan, fits


def _shortlist(
    launch: Launch, codes: Tensor, plan: Tensor, capacity: Size, **constants: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions [B, L, capacity] int32 that may come first, their codes, counts [B, L]."""
    from dartfx.ops import triton_kernels

    batch, rankings, sequence = codes.shape
    new = functools.partial(torch.empty, dtype=torch.int32, device=codes.device)
    listed, counts = new((batch, rankings, capacity)), new((batch, rankings))
    listed_codes = counts if constants["PIVOTS"] else new((batch, rankings, capacity))
    launch(
        triton_kernels.shortlist,
        (batch, rankings),
        *(codes, plan, listed, listed_codes, counts, sequence, capacity),
        **constants,
        BLOCK=_SHORTLIST_TILE,
        num_warps=_SHORTLIST_WARPS,
    )
    return listed, listed_codes, counts


def _cosines(
    launch: Launch, hidden: Tensor, row: _Row, norms: Tensor, plan: Tensor, pivots: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of the vision tokens [B, P, S] int32, and ranks [B, S, P] for :func:`_ranks`."""
    from dartfx.ops import triton_kernels

    batch, sequence, width = hidden.shape
    new = functools.partial(torch.empty, dtype=torch.int32, device=hidden.device)
    codes, ranks = new((batch, row.slots, sequence)), new((batch, sequence, row.slots))
    block, row_bytes, per_program = _COSINE_TILE
    launch(
        triton_kernels.cosines,
        (batch, _tiles(sequence, block), _tiles(row.slots, per_program)),
        *(hidden, row.masks[0], norms, plan, pivots, codes, ranks, sequence, *hidden.stride()),
        D=width if row.image + row.text else 0,
        SLOTS=row.slots,
        CAPACITY=row.capacity,
        EPS=EPS,
        NARROW=_for_matrix_units(hidden.dtype),
        COLUMNS=_power_of_two(row.slots),
        BLOCK_S=block,
        BLOCK_D=max(16, min(row_bytes // hidden.itemsize, _power_of_two(width))),
        BLOCK_P=per_program,
        num_warps=_COSINE_WARPS,
    )
    return codes, ranks


def _for_matrix_units(dtype: torch.dtype) -> bool:
    """Whether products of these numbers can be left to them: they are exact, then."""
    # The interpreter multiplies bfloat16 as the integers that it holds them in.
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not _interpreted())


def _ranks(launch: Launch, listed: Tensor, codes: Tensor, counts: Tensor, ranks: Tensor) -> Tensor:
    """The listed positions by rank [B, P, S'] int32; fills in their ``ranks`` [B, S, P]."""
    from dartfx.ops import triton_kernels

    batch, rankings, capacity = listed.shape
    order = torch.empty_like(listed)
    block, others = _RANK_TILE
    launch(
        triton_kernels.rank,
        (batch, rankings, capacity // block + 1),
        *(listed, codes, counts, ranks, order, ranks.shape[1], capacity),
        BLOCK=block,
        OTHERS=others,
    )
    return order


def _kept(
    launch: Launch, row: _Row, plan: Tensor, pivots: Tensor, ranks: Tensor, order: Tensor
) -> Tensor:
    """The kept positions [B, S'] int64."""
    from dartfx.ops import triton_kernels

    batch, sequence, slots = ranks.shape
    keep_idx = torch.empty((batch, row.length), dtype=torch.int64, device=ranks.device)
    columns = max(4, _power_of_two(slots))  # with 1 or 2, Triton 3.9 spills for sm_80 or sm_90
    *tiles, scan = _SELECT_TILE
    turn, block = (size // max(8, columns) for size in tiles)
    launch(
        triton_kernels.select,
        (batch, _tiles(sequence, block)),
        *(*row.masks, plan, pivots, ranks, order, keep_idx, sequence, row.length),
        SLOTS=slots,
        CAPACITY=row.capacity,
        HAS_VALID=row.has_valid,
        COLUMNS=columns,
        BLOCK=block,
        TURN=turn,
        SCAN=scan,
        num_warps=_SELECT_WARPS,
    )
    return keep_idx


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
