"""The operators of dartfx as plain ATen, for programs that run where dartfx is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dartfx.ops.nearest_kept import nearest
from dartfx.ops.registration import assertion, selection
from dartfx.selection.opaque import BODIES

__all__ = ["PLAIN"]

# A check per row costs a comparison each, in the program's own code; larger batches get one.
_MOST_ROWS_NAMED = 16


def _require_rows(value: Tensor, ok: Tensor, message: str) -> Tensor:
    """``value``, after a check that every row of ``ok`` [B] holds; ``message`` names ``{row}``.

    On the CPU the check reads one number and asserts on it: ahead-of-time code raises from that,
    but an assertion inside a loop throws in the middle of an OpenMP region, which ends the process.
    Such code leaves messages out and says only what it received, which is the row's number.
    Elsewhere it is an assertion on the device, which reads nothing on the host.
    """
    rows: Any = ok.shape[0]
    if ok.device.type != "cpu":
        torch.ops.aten._assert_async.msg(ok.all(), assertion(message, rows))
        return value
    first: Any = torch.where(ok, rows, torch.arange(rows, device=ok.device)).amin().item()
    check = torch.ops.aten._assert_scalar.default
    if type(rows) is int and rows <= _MOST_ROWS_NAMED:
        for row in range(rows):
            check(first != row, message.replace("{row}", str(row)))
    else:
        check(first >= rows, message.replace("{row}", "(one of them)"))
    return value


# Running counts, searches and writes by index make the ahead-of-time compiler emit a C++ loop of
# its own for each, which takes it minutes. Sorts are calls of torch's own kernels.


def _take_in_turn(order: Tensor, members: Tensor, quota: Tensor) -> Tensor:
    """What :func:`dartfx.selection.dart.take_in_turn` returns; arguments as there."""
    sequence = members.shape[1]
    ranks = order.argsort(-1)
    left = members
    for taker in range(order.shape[1]):
        # A position's rank in this taker's order; after all others once it is taken.
        rank = torch.where(left, ranks[:, taker], sequence)
        count = quota[:, taker, None]
        last = rank.sort(-1).values.gather(1, (count - 1).clamp(min=0))
        left = left & ((rank > last) | (count < 1))
    return members & ~left


def _positions_of(mask: Tensor, size: Any) -> Tensor:
    """What :func:`dartfx.selection.dart.positions_of` returns; arguments as there."""
    sequence = mask.shape[1]
    position = torch.arange(sequence, device=mask.device)
    ordered = torch.where(mask, position, sequence).sort(-1).values
    # size may exceed the number of positions.
    wanted = torch.arange(size, device=mask.device).clamp(max=sequence - 1)
    return ordered.index_select(1, wanted).clamp(max=sequence - 1)


_ops = torch.ops.dartfx

PLAIN: Mapping[object, Callable[..., Any]] = {
    **BODIES,
    _ops.select_tokens.default: selection,
    _ops.take_in_turn.default: _take_in_turn,
    _ops.positions_of.default: _positions_of,
    _ops.require_rows.default: _require_rows,
    _ops.nearest_kept.default: nearest,
}
"""What each operator that the passes may leave in a graph does, in ATen and others of these."""
