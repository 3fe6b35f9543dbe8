"""What happens to one step's requests at the cut, as arithmetic on lengths and KV blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dropped", "Step", "compact_slots", "plan_step", "starts_of"]


@dataclass(frozen=True)
class Step:
    """The requests of one step.

    starts: where each request's rows begin, and where the last one's end.  is_prefill, prompts (the
    prompt's length), dropped (vision tokens that a prefill drops): by request.
    vision: [T] bool on the host, the vision tokens that may be dropped; None where there are none.
    """

    starts: list[int]
    is_prefill: list[bool]
    prompts: list[int]
    dropped: list[int]
    vision: Tensor | None

    @property
    def rows_left(self) -> list[int]:
        """Rows of each request behind the cut."""
        ends = zip(self.starts, self.starts[1:], self.dropped, strict=False)
        return [end - start - dropped for start, end, dropped in ends]


def plan_step(
    starts: list[int],
    lengths: Sequence[int],
    prompt_lengths: Mapping[int, int],
    vision: Tensor | None,
    dropped: Callable[[int], int],
) -> Step:
    """What each request drops: starts [B + 1], lengths [B] (tokens with those of this step).

    A prompt's last token stays, whatever it is: the first answer token is read off it.  Raises
    RuntimeError for vision tokens of a prompt that does not come whole.
    """
    vision = vision.clone() if vision is not None and bool(vision.any()) else None
    is_prefill, prompts, drops = [], [], []
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        whole = int(lengths[row]) == end - start
        prompt = min(prompt_lengths.get(row, end - start), end - start) if whole else 0
        count = 0
        if vision is not None and whole:
            vision[start + prompt - 1] = False
            count = int(vision[start : start + prompt].sum())
        elif vision is not None and bool(vision[start:end].any()):
            raise RuntimeError("dartfx: the vision tokens of a prompt came in several chunks")
        is_prefill.append(whole)
        prompts.append(prompt)
        drops.append(dropped(count))
    return Step(starts, is_prefill, prompts, drops, vision)


class Dropped:
    """How many tokens layers behind the cut lack, by the first KV block of a request.

    A block belongs to one request and one KV cache group from prefill to its end or preemption, so
    nothing has to be removed: the next prefill in the block overwrites.
    """

    def __init__(self) -> None:
        self._by_block = torch.zeros(0, dtype=torch.int32)

    def of(self, blocks: Tensor, step: Step) -> Tensor:
        """[B] int32 on the device of blocks [B]; prefills of ``step`` are noted first."""
        # The blocks' numbers are read on the host: once a step for each KV cache group.
        at = blocks.cpu().long()
        if at.numel() and (most := int(at.max())) >= len(self._by_block):
            more = self._by_block.new_zeros(2 * most + 1 - len(self._by_block))
            self._by_block = torch.cat([self._by_block, more])
        prefills = torch.tensor(step.is_prefill, dtype=torch.bool)
        now = torch.tensor(step.dropped, dtype=torch.int32)
        self._by_block[at[prefills]] = now[prefills]
        return self._by_block[at]


def starts_of(rows: Sequence[int]) -> Tensor:
    """[B + 1] int32 on the host: where each request's rows begin, and the end."""
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(list(rows), dtype=torch.int32).cumsum(0)
    return starts


def compact_slots(block_table: Tensor, rows: Sequence[int], lengths: Tensor, block: int) -> Tensor:
    """[T'] int64 KV slots of the last ``rows[i]`` of ``lengths[i]`` tokens of each request.

    block_table: [B, blocks].  lengths: [B] on the host.  block: tokens in a block.  A request's
    tokens lie one after the other from its first block on.
    """
    counts = torch.tensor(list(rows), dtype=torch.int64)
    request = torch.repeat_interleave(torch.arange(len(rows)), counts)
    first = (lengths.long() - counts - starts_of(rows)[:-1])[request]
    position = (first + torch.arange(len(request))).to(block_table.device)
    blocks = block_table[request.to(block_table.device), position // block].long()
    return blocks * block + position % block
