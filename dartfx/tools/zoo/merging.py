"""Averages dropped vision tokens into the kept ones, token by token in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from dartfx.tools.zoo.oracle import as_float64, cosine

__all__ = ["merged"]


def merged(hidden: Tensor, compared: Tensor, keep_idx: Tensor, vision: Tensor) -> Tensor:
    """Average each kept vision token's group into it, in ``hidden`` [B, S, D].

    A group is a kept vision token and every dropped one whose cosine in ``compared`` [B, S, D] is
    largest to it.  keep_idx: [B, S'].  vision: [B, S] bool.
    """
    result, values = hidden.clone(), as_float64(hidden)
    vectors = as_float64(compared)
    for row, kept in enumerate(keep_idx.tolist()):
        groups = {k: [k] for k in kept if bool(vision[row, k])}
        for token in range(hidden.shape[1]):
            if bool(vision[row, token]) and token not in groups and groups:
                alike = {k: cosine(vectors[row, token], vectors[row, k]) for k in groups}
                groups[max(alike, key=lambda k: (alike[k], -k))].append(token)
        for k, group in groups.items():
            mean = torch.from_numpy(values[row, group].mean(0))
            result[row, k] = mean.to(hidden.dtype)
    return result
