"""Batches for the selection operator, and what the oracle says about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import dartfx.ops  # noqa: F401  (registers torch.ops.dartfx.select_tokens)
from dartfx.tools.zoo import oracle


def draw(seed: int, S: int | None = None, **given: Any) -> dict[str, Any]:
    """A random padded batch with several vision spans per row, equal in number of tokens."""
    rng = np.random.default_rng(seed)
    B = given.get("B", int(rng.integers(1, 4)))
    S = int(rng.integers(1, 201)) if S is None else S
    D, H, Dh = (int(rng.integers(1, n)) for n in (33, 5, 17))
    valid = np.ones((B, S), dtype=bool)
    for b in range(B):
        pad = int(rng.integers(0, S // 3 + 1)) if B > 1 else 0
        valid[b, :pad] = False
        if rng.random() < 0.3:
            valid[b] = valid[b, ::-1]
    N = int(rng.integers(1, valid.sum(1).min() + 1))
    vision = np.zeros((B, S), dtype=bool)
    for b in range(B):
        where = np.flatnonzero(valid[b])
        if rng.random() < 0.5:  # one span
            start = int(rng.integers(0, len(where) - N + 1))
            vision[b, where[start : start + N]] = True
        else:  # many spans with text between them
            vision[b, rng.choice(where, N, replace=False)] = True
    integers = given.get("integers", False)
    shapes = {"hidden": (B, S, D), "keys": (B, H, S, Dh)}
    floats = {
        name: rng.integers(-2, 3, shape) if integers else rng.standard_normal(shape)
        for name, shape in shapes.items()
    }
    dtype = given.get("dtype", torch.float32)
    return {
        **{name: torch.tensor(x).to(dtype) for name, x in floats.items()},
        "vision_mask": torch.tensor(vision),
        "valid_mask": torch.tensor(valid),
        "retain": int(rng.integers(0, N + 3)),
        "pivot_image_tokens": int(rng.integers(0, 6)),
        "pivot_text_tokens": int(rng.integers(0, 6)),
    }


def expected(case: dict[str, Any]) -> oracle.Batch:
    return oracle.select_batch(
        case["hidden"],
        case["keys"],
        case["vision_mask"],
        case["retain"],
        case.get("valid_mask"),
        case.get("pivot_image_tokens", 4),
        case.get("pivot_text_tokens", 4),
    )


def operator(case: dict[str, Any], selector: str = "dart", kernel: str = "auto") -> Tensor:
    """The operator itself, as a compiled graph calls it."""
    vision = case["vision_mask"]
    result: Tensor = torch.ops.dartfx.select_tokens(
        case["hidden"],
        case["keys"],
        vision,
        case.get("valid_mask"),
        case["N"] if "N" in case else int(vision.sum()) // vision.shape[0],
        case["retain"],
        case.get("pivot_image_tokens", 4),
        case.get("pivot_text_tokens", 4),
        selector,
        kernel,
    )
    return result


def plain(B: int = 1, S: int = 40, first: int = 5, N: int = 24, retain: int = 9) -> dict[str, Any]:
    """One vision span per row at the same place, no pads."""
    generator = torch.Generator().manual_seed(B * 1000 + S)
    vision = torch.zeros(B, S, dtype=torch.bool)
    vision[:, first : first + N] = True
    return {
        "hidden": torch.randn(B, S, 16, generator=generator),
        "keys": torch.randn(B, 2, S, 8, generator=generator),
        "vision_mask": vision,
        "retain": retain,
    }


def ragged(counts: list[int], pads: list[int], words: int, side: str = "left") -> dict[str, Any]:
    """Rows with ``counts[b]`` vision tokens, ``words`` text positions after, ``pads[b]`` pads."""
    S = max(n + p for n, p in zip(counts, pads, strict=True)) + words
    case = plain(B=len(counts), S=S)
    case["vision_mask"] = torch.zeros(len(counts), S, dtype=torch.bool)
    case["valid_mask"] = torch.zeros(len(counts), S, dtype=torch.bool)
    for b, n in enumerate(counts):
        start = S - n - words if side == "left" else 0
        case["vision_mask"][b, start : start + n] = True
        case["valid_mask"][b, start : start + n + words] = True
    return case


def one_hot(seed: int, S: int | None = None) -> dict[str, Any]:
    """Many ties: one-hot vectors of power-of-two length; all sums, norms, quotients are exact."""
    case = draw(seed, S, integers=True)
    rng = np.random.default_rng(seed)
    B, S = case["vision_mask"].shape
    hidden = np.zeros((B, S, 4))
    axis, scale = rng.integers(0, 4, (B, S)), rng.choice([-2.0, -1.0, 0.0, 1.0, 4.0], (B, S))
    np.put_along_axis(hidden, axis[..., None], scale[..., None], 2)
    return {**case, "hidden": torch.tensor(hidden, dtype=torch.float32)}


def losing_text() -> dict[str, Any]:
    """Row 1 has more text than S - N + R."""
    case = {**plain(B=2, S=300, N=200, retain=10), "N": 200}
    case["vision_mask"][1, 150:] = False
    case["vision_mask"][0, :220] = True
    case["hidden"], case["keys"] = torch.randn(2, 300, 256), torch.randn(2, 4, 300, 64)
    return case
