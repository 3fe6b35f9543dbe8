"""Plans what one step's requests do at the cut: arithmetic on lengths and KV blocks.

Layers before the cut process a prompt in vLLM's chunks.  Text before the first image passes the cut
with its chunk; later rows are held until the prompt is complete, since the selection needs all of
them.  Nothing before the first image is dropped or used by the selection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Part",
    "Prompt",
    "compact_slots",
    "pieces",
    "plan_step",
    "starts_of",
    "where_stored",
]


@dataclass
class Prompt:
    """A request's prompt of ``tokens`` tokens, of which ``dropped`` are dropped at the cut.

    first: position of its first image.  held: rows held at the cut while the prompt is incomplete.
    """

    tokens: int
    first: int
    dropped: int
    held: Any = None

    def behind(self, count: int) -> int:
        """Tokens behind the cut after the request's first ``count`` have been computed."""
        if not self.dropped:
            return count
        return count - self.dropped if count >= self.tokens else min(count, self.first)


@dataclass(frozen=True)
class Part:
    """One request in a step: rows [start, end), with [seen_from, seen_to) input to the selection.

    The other rows pass unchanged.  count: the request's tokens including this step.  prompt: None
    for a request that drops nothing.
    """

    start: int
    seen_from: int
    seen_to: int
    end: int
    count: int
    prompt: Prompt | None

    @property
    def sees(self) -> bool:
        """Whether any of its rows are input to the selection, now or at the prompt's end."""
        return self.seen_to > self.seen_from

    @property
    def selects(self) -> bool:
        """Whether this step completes its prompt."""
        return self.sees and self.prompt is not None and self.count >= self.prompt.tokens

    @property
    def position(self) -> int:
        """The request position of the first row that is input to the selection."""
        return self.count - (self.end - self.seen_from)

    @property
    def length(self) -> int:
        """The request's tokens behind the cut."""
        return self.count if self.prompt is None else self.prompt.behind(self.count)


def plan_step(
    starts: Sequence[int], counts: Sequence[int], prompts: Mapping[int, Prompt]
) -> list[Part]:
    """Plan a step's requests: row starts [B + 1], token counts [B], prompts by batch index."""
    parts = []
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        count, prompt = int(counts[row]), prompts.get(row)
        first_row = start - (count - (end - start))  # where the request's token 0 would be
        if prompt is None:
            bounds = end, end
        else:
            bounds = (
                min(max(first_row + prompt.first, start), end),
                min(max(first_row + prompt.tokens, start), end),
            )
        parts.append(Part(start, *bounds, end, count, prompt))
    return parts


def pieces(
    rows: Sequence[int], lengths: Sequence[int], most: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Split the requests' rows and lengths into pieces of at most ``most`` rows, in order.

    The kept rows of several chunks can exceed what the layers behind the cut take at once.
    """
    left = list(rows)
    while any(left):
        room, taken = most, []
        for count in left:
            taken.append(min(count, room))
            room -= taken[-1]
        left = [count - some for count, some in zip(left, taken, strict=True)]
        yield taken, [length - later for length, later in zip(lengths, left, strict=True)]


def starts_of(rows: Sequence[int]) -> Tensor:
    """[B + 1] int32 on the host: the start of each request's rows, and the end."""
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(list(rows), dtype=torch.int32).cumsum(0)
    return starts


def where_stored(rows: Sequence[int], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[T'] int64 request and position of the last ``rows[i]`` of each request's ``lengths[i]``.

    lengths: [B], on the result's device.  With speculative decoding only the device knows how many
    draft tokens were accepted, so the host's lengths are too large.
    """
    counts = torch.tensor(rows)
    request = torch.repeat_interleave(torch.arange(len(rows)), counts)
    first = lengths.long() - (counts + starts_of(rows)[:-1]).to(lengths.device)
    request = request.to(lengths.device)
    return request, first[request] + torch.arange(len(request), device=lengths.device)


def compact_slots(block_table: Tensor, request: Tensor, position: Tensor, block: int) -> Tensor:
    """[T'] int64 KV slots of tokens stored contiguously from a request's first block on.

    block_table: [B, blocks].  request, position: from :func:`where_stored`.  block: tokens in a
    block.
    """
    blocks = block_table[request, position // block].long()
    return blocks * block + position % block
