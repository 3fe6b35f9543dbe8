"""The cut between two decoder layers: which rows go on, and what the layers behind it see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dartfx.config import DartConfig
from dartfx.integrations.vllm import vllm_api
from dartfx.integrations.vllm.batch import Dropped, Step, compact_slots, starts_of
from dartfx.selection.registry import uses_key_norms_only

__all__ = ["Layer", "group_by_metadata", "rows_kept", "shorten"]


class Layer:
    """What the selection takes from the model: its final norm, the attention of layer K-1."""

    def __init__(self, norm: Any, attention: Any, ranks: int) -> None:
        self.norm = norm
        self.attention = attention
        self.ranks = ranks

    def hidden(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """[T, D] hidden states after the final norm, out of place: vLLM's own writes to both."""
        normed: Tensor = self.norm(hidden + residual)
        return normed

    def keys(self, keys: Tensor, selector: str) -> Tensor:
        """[1, H, T, Dh] keys, or [1, 1, T, 1] numbers with the same L1 norms."""
        if not uses_key_norms_only(selector):
            split = keys.view(len(keys), self.attention.num_kv_heads, -1)
            return split.transpose(0, 1)[None]
        norms = keys.abs().sum(1, dtype=torch.float32)
        if self.ranks > 1:
            # Ranks hold heads of their own: the sums add up, and every rank keeps the same.
            norms = vllm_api.tensor_model_parallel_all_reduce(norms)
        return norms[None, None, :, None]


def rows_kept(
    config: DartConfig, layer: Layer, step: Step, hidden: Tensor, residual: Tensor, keys: Tensor
) -> Tensor | None:
    """[T'] int64 rows of the batch that go on, ascending; None where all do."""
    if not any(step.dropped):
        return None
    assert step.vision is not None
    vision = step.vision.to(hidden.device)
    hidden, keys = layer.hidden(hidden, residual), layer.keys(keys, config.selector)
    kept = []
    for i, (start, end) in enumerate(zip(step.starts, step.starts[1:], strict=False)):
        if not step.dropped[i]:
            kept.append(torch.arange(start, end, device=hidden.device))
            continue
        stop = start + step.prompts[i]  # behind it: tokens that were generated before a preemption
        count = int(step.vision[start:stop].sum())
        chosen = torch.ops.dartfx.select_tokens(
            *(hidden[None, start:stop], keys[:, :, start:stop], vision[None, start:stop], None),
            *(count, config.retain_for(count), config.pivot_image_tokens),
            *(config.pivot_text_tokens, config.selector, config.kernel),
        )
        kept += [chosen[0] + start, torch.arange(stop, end, device=hidden.device)]
    return torch.cat(kept)


def group_by_metadata(metadata: Any, names: Iterable[str]) -> list[list[str]]:
    """Names of layers, those with the same metadata together."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(metadata[name]), []).append(name)
    return list(groups.values())


def shorten(context: Any, names: list[str], step: Step, dropped: Dropped) -> None:
    """Put metadata and KV slots for the kept rows into vLLM's forward context.

    names: layers behind the cut that share metadata.
    """
    source = context.attn_metadata[names[0]].dartfx_source
    batch, requests = source.batch, len(step.is_prefill)
    lost = dropped.of(batch.block_table_tensor[:requests, 0], step)
    if not bool(lost.any()):
        return
    rows = step.rows_left
    lengths = batch.seq_lens_cpu_upper_bound[:requests] - lost
    slots = compact_slots(
        batch.block_table_tensor, rows, lengths, source.builder.kv_cache_spec.block_size
    )
    starts, device = starts_of(rows), batch.seq_lens.device
    shorter = batch.replace(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=batch.seq_lens[:requests] - lost.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=int(lengths.max()),
        slot_mapping=slots,
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    metadata = source.rebuild(shorter)
    for name in names:
        context.attn_metadata[name] = metadata
        context.slot_mapping[name] = slots
