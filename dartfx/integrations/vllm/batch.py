"""What happens to one step's requests at the cut, as arithmetic on lengths and KV blocks.

Layers before the cut take a prompt in the chunks that vLLM makes of it.  Text before the first
image passes the cut in its chunk; rows from there on are held until the prompt is complete, since
the selection looks at all of them.  Nothing before the first image is dropped or looked at.
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

    first: position of its first image.  held: what the cut holds of it while it is incomplete.
    """

    tokens: int
    first: int
    dropped: int
    held: Any = None

    def behind(self, count: int) -> int:
        """Tokens behind the cut, once the request's first ``count`` went through the layers."""
        if not self.dropped:
            return count
        return count - self.dropped if count >= self.tokens else min(count, self.first)


@dataclass(frozen=True)
class Part:
    """One request in a step: rows [start, end), of which [seen_from, seen_to) are the selection's.

    The other rows pass as they are.  count: its tokens with those of this step.  prompt: None for
    a request that drops nothing.
    """

    start: int
    seen_from: int
    seen_to: int
    end: int
    count: int
    prompt: Prompt | None

    @property
    def sees(self) -> bool:
        """Whether some of its rows are the selection's, now or once the prompt is complete."""
        return self.seen_to > self.seen_from

    @property
    def selects(self) -> bool:
        """Whether its prompt becomes complete."""
        return self.sees and self.prompt is not None and self.count >= self.prompt.tokens

    @property
    def position(self) -> int:
        """Position in the request of the first row that is the selection's."""
        return self.count - (self.end - self.seen_from)

    @property
    def length(self) -> int:
        """Its tokens behind the cut."""
        return self.count if self.prompt is None else self.prompt.behind(self.count)


def plan_step(
    starts: Sequence[int], counts: Sequence[int], prompts: Mapping[int, Prompt]
) -> list[Part]:
    """The requests of a step: starts [B + 1] of their rows, counts [B], prompts by row of B."""
    parts = []
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        count, prompt = int(counts[row]), prompts.get(row)
        first_row = start - (count - (end - start))  # of the request's token 0, if it were there
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
    """Rows and lengths of each request, in pieces of at most ``most`` rows, in order.

    Kept rows of several chunks can be more than the layers behind the cut take at a time.
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
    """[B + 1] int32 on the host: where each request's rows begin, and the end."""
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(list(rows), dtype=torch.int32).cumsum(0)
    return starts


def where_stored(rows: Sequence[int], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[T'] int64 request and position of the last ``rows[i]`` of ``lengths[i]`` tokens of each.

    lengths: [B], on the device that the result is for.  With drafts only the device knows how many
    of the last ones were accepted, so the host's lengths are too large.
    """
    counts = torch.tensor(rows)
    request = torch.repeat_interleave(torch.arange(len(rows)), counts)
    first = lengths.long() - (counts + starts_of(rows)[:-1]).to(lengths.device)
    request = request.to(lengths.device)
    return request, first[request] + torch.arange(len(request), device=lengths.device)


def compact_slots(block_table: Tensor, request: Tensor, position: Tensor, block: int) -> Tensor:
    """[T'] int64 KV slots of tokens that lie one after the other from a request's first block on.

    block_table: [B, blocks].  request, position: from :func:`where_stored`.  block: tokens in one.
    """
    blocks = block_table[request, position // block].long()
    return blocks * block + position % block
