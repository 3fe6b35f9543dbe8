"""The cut between two decoder layers: which rows are kept, and what later layers see of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dartfx.config import DartConfig
from dartfx.integrations.vllm import options, vllm_api
from dartfx.integrations.vllm.batch import Part, compact_slots, starts_of, where_stored
from dartfx.selection.registry import uses_key_norms_only

__all__ = ["Layer", "Piece", "Rows", "group_by_metadata", "hold", "rows_kept", "with_held"]


class Layer:
    """What the selection uses of the model: its final norm and the attention of layer K-1."""

    def __init__(self, norm: Any, attention: Any, ranks: int) -> None:
        self.norm = norm
        self.attention = attention
        self.ranks = ranks

    def hidden(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """[T, D] hidden states after the final norm, out of place: vLLM's op mutates its inputs."""
        normed: Tensor = self.norm(hidden + residual)
        return normed

    def keys(self, keys: Tensor, selector: str) -> Tensor:
        """[1, H, T, Dh] keys, or [1, 1, T, 1] numbers with the same L1 norms."""
        if not uses_key_norms_only(selector):
            split = keys.view(len(keys), self.attention.num_kv_heads, -1)
            return split.transpose(0, 1)[None]
        norms = keys.abs().sum(1, dtype=torch.float32)
        if self.ranks > 1:
            # Each rank has its own heads: with the sum over ranks, all keep the same tokens.
            norms = vllm_api.tensor_model_parallel_all_reduce(norms)
        return norms[None, None, :, None]


@dataclass(frozen=True)
class Rows:
    """Tokens between the two halves of the decoder.

    positions: [T] or [3, T].  hidden, residual: [T, D].  keys: [1, H, T, Dh].  vision: [T] bool on
    the host.  begins: request position of the first row, where all are of one request.
    """

    positions: Tensor
    hidden: Tensor
    residual: Tensor
    keys: Tensor
    vision: Tensor
    begins: int = 0

    def __len__(self) -> int:
        return len(self.hidden)

    def copied(self, start: int, end: int, begins: int) -> Rows:
        """Copy rows of one request."""
        rows = slice(start, end)
        return Rows(
            positions=self.positions[..., rows].clone(),
            hidden=self.hidden[rows].clone(),
            residual=self.residual[rows].clone(),
            keys=self.keys[:, :, rows].clone(),
            vision=self.vision[rows].clone(),
            begins=begins,
        )

    def joined(self, more: Sequence[Rows]) -> Rows:
        """Concatenate these rows with ``more``."""
        if not more:
            return self
        every = [self, *more]
        return replace(
            self,
            positions=torch.cat([rows.positions for rows in every], -1),
            hidden=torch.cat([rows.hidden for rows in every]),
            residual=torch.cat([rows.residual for rows in every]),
            keys=torch.cat([rows.keys for rows in every], 2),
            vision=torch.cat([rows.vision for rows in every]),
        )


def _held(part: Part) -> Rows | None:
    """The held rows of the part's prompt, if this chunk follows them.

    A request preempted in the middle of its prompt starts over, so its held rows are discarded.
    Raises RuntimeError if rows are missing.
    """
    assert part.prompt is not None
    held: Rows | None = part.prompt.held
    if held is not None and held.begins + len(held) == part.position:
        return held
    part.prompt.held = None
    if part.position != part.prompt.first:
        raise RuntimeError(
            f"dartfx: a chunk begins at token {part.position} of a prompt whose first image is at "
            f"token {part.prompt.first}, and what lies between has not passed"
        )
    return None


def hold(parts: Iterable[Part], rows: Rows) -> None:
    """Store the rows of incomplete prompts."""
    for part in parts:
        if part.sees and not part.selects:
            assert part.prompt is not None
            held = _held(part)
            begins = held.begins if held is not None else part.position
            more = rows.copied(part.seen_from, part.seen_to, begins)
            part.prompt.held = more if held is None else held.joined([more])


def with_held(parts: Iterable[Part], rows: Rows) -> tuple[Rows, list[int]]:
    """The step's rows, then the held rows of prompts that it completes, with their counts."""
    held = [_held(part) if part.selects else None for part in parts]
    for part in parts:
        if part.prompt is not None and part.selects:
            part.prompt.held = None
    counts = [0 if each is None else len(each) for each in held]
    return rows.joined([each for each in held if each is not None]), counts


def rows_kept(
    config: DartConfig, layer: Layer, parts: Sequence[Part], rows: Rows, held: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """[T'] int64 rows that pass the cut, request by request, and each request's count.

    rows, held: from :func:`with_held`.
    """
    device = rows.hidden.device
    more = itertools.accumulate(held, initial=len(rows) - sum(held))
    kept, counts = [], []
    for part, before, here in zip(parts, more, held, strict=False):
        mine = [torch.arange(part.start, part.seen_from, device=device)]
        if part.selects:
            ranges = (before, before + here), (part.seen_from, part.seen_to)
            seen = torch.cat([torch.arange(*each, device=device) for each in ranges])
            vision = torch.cat([rows.vision[start:end] for start, end in ranges])
            mine.append(_select(config, layer, part, rows, seen, vision))
        mine.append(torch.arange(part.seen_to, part.end, device=device))
        kept += mine
        counts.append(sum(map(len, mine)))
    return torch.cat(kept), counts


def _select(
    config: DartConfig, layer: Layer, part: Part, rows: Rows, seen: Tensor, vision: Tensor
) -> Tensor:
    """Select the kept rows of ``seen``, a complete prompt from its first image on.

    vision: [len(seen)] bool on the host.  A prompt's last token is always kept: its logits predict
    the first answer token.
    """
    assert part.prompt is not None
    vision[-1] = False
    count = int(vision.sum())
    if options.dropped(config, count) != part.prompt.dropped:
        raise RuntimeError(
            f"dartfx: a prompt has {count} vision tokens, which does not go with the "
            f"{part.prompt.dropped} that its scheduler counts as dropped"
        )
    hidden = layer.hidden(rows.hidden[seen], rows.residual[seen])
    chosen = torch.ops.dartfx.select_tokens(
        *(hidden[None], rows.keys[:, :, seen], vision.to(seen.device)[None], None),
        *(count, config.retain_for(count), config.pivot_image_tokens),
        *(config.pivot_text_tokens, config.selector, config.kernel),
    )
    return seen[chosen[0]]


def group_by_metadata(metadata: Any, names: Iterable[str]) -> list[list[str]]:
    """Group layer names by shared metadata."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(metadata[name]), []).append(name)
    return list(groups.values())


class Piece:
    """Rows that run through the layers behind the cut at once, for all KV cache groups.

    batch: the step's.  rows: number per request.  lengths: each request's tokens behind the cut,
    including those rows.
    """

    def __init__(self, batch: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
        here = [i for i, count in enumerate(rows) if count]  # the others have nothing to compute
        counts, after = [rows[i] for i in here], [lengths[i] for i in here]
        device, at = batch.seq_lens.device, torch.tensor(here)
        self.requests = at.to(device)
        starts, left = starts_of(counts), torch.tensor(after, dtype=torch.int32)
        lost = (batch.seq_lens_cpu_upper_bound[at] - left).to(device)
        stored = batch.seq_lens[self.requests] - lost
        self.request, self.position = where_stored(counts, stored)
        self.common = {
            "query_start_loc": starts.to(device),
            "query_start_loc_cpu": starts,
            "seq_lens": stored,
            "seq_lens_cpu_upper_bound": left,
            "num_reqs": len(here),
            "num_actual_tokens": sum(counts),
            "max_query_len": max(counts),
            "max_seq_len": max(after),
            "is_prefilling": None if batch.is_prefilling is None else batch.is_prefilling[at],
            "req_idx": None if batch.req_idx is None else batch.req_idx[at.numpy()],
            "positions": None,
            "_num_computed_tokens_cache": None,
            "_token_to_req_indices_cache": None,
        }

    def put(self, context: Any, source: Any, names: list[str]) -> None:
        """Put metadata and KV slots of these rows into vLLM's forward context.

        source: of the step's metadata.  names: the layers that share it.
        """
        table = source.batch.block_table_tensor[self.requests]
        slots = compact_slots(
            table, self.request, self.position, source.builder.kv_cache_spec.block_size
        )
        shorter = source.batch.replace(**self.common, block_table_tensor=table, slot_mapping=slots)
        metadata = source.rebuild(shorter)
        for name in names:
            context.attn_metadata[name] = metadata
            context.slot_mapping[name] = slots
