"""``torch.ops.dartfx.select_tokens``: the selection as one operator of a graph.

It stays one node under ``make_fx`` and fake tensors. AOTAutograd replaces it by the plain ATen of
``selection/dart.py``, which the compiler then fuses, or by the kernels of ``triton_kernels.py``,
which the compiler launches as part of its own graph; in eager it runs that same code directly.
``custom_op`` with a FunctionalTensorMode rule does what ``torch.library.triton_op`` does, but
keeps the integer arguments of the schema apart from the symbolic sizes and does not warn at
import where Triton is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import custom_op

import dartfx.ops.nearest_kept
import dartfx.ops.select_spans  # noqa: F401  registers torch.ops.dartfx.select_spans
from dartfx import compat
from dartfx.errors import ConfigError, KernelUnavailableError, SelectionError
from dartfx.ops import triton_launch, validation
from dartfx.selection import registry
from dartfx.selection.batch_rule import (
    BatchPlan,
    Size,
    enforce_budget,
    keep_positions,
    kept_length,
    plan_batch,
    smaller,
)

__all__ = ["KERNELS", "TEXT_LOST", "assertion", "checked", "choose_kernel"]

KERNELS = ("auto", "torch", "triton")

TEXT_LOST = (
    "dartfx.select_tokens: row {row} has more valid text than fits with its vision tokens in "
    "the S - N + R positions that rows keep; text is never dropped. Give all rows as many vision "
    "tokens, pad the batch further, or run the row alone"
)
_WRONG_COUNT = (
    "dartfx.select_tokens: {who} did not keep exactly budget[b] vision tokens in row "
    "b = {{row}}; return a [B, S] bool mask inside vision_mask with budget[b] True entries per row"
)
_NO_QUOTA = "the kernels choose among all vision tokens of a row, and quota sets budgets per image"
_LONGEST = 254  # characters; torch refuses to launch a CUDA assertion with more


def assertion(message: str, rows: int) -> str:
    """What an assertion on the device says: the row only where there is but one."""
    text = message.replace("{row}", "0" if rows == 1 else f"(one of {rows})")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


@custom_op("dartfx::require_rows", mutates_args=(), schema="(Tensor x, Tensor ok, str m) -> Tensor")
def require_rows(value: Tensor, ok: Tensor, message: str) -> Tensor:
    """A copy of ``value``, once every row of ``ok`` [B] bool holds; ``message`` names ``{row}``.

    On the CPU it raises SelectionError. Elsewhere it is one assertion on the device, without a
    host read, whose message can name the row only where there is but one. An operator of its own,
    because the assertions that Inductor generates for the CPU throw inside OpenMP regions, which
    ends the process; and one with a result, because nothing removes an operator whose result is
    used.
    """
    rows = ok.shape[0]
    if ok.device.type == "cpu":
        for row, holds in enumerate(ok.tolist()):
            if not holds:
                raise SelectionError(message.replace("{row}", str(row)))
    else:
        compat.assert_async(ok if rows == 1 else ok.all(), assertion(message, rows))
    return value.clone()


@require_rows.register_fake
def _require_rows_fake(value: Tensor, ok: Tensor, message: str) -> Tensor:
    return torch.empty_like(value)


def choose_kernel(
    kernel: str, device: torch.device, unsupported: Callable[[], str] = str
) -> Literal["torch", "triton"]:
    """Which implementation runs on ``device``: with "auto", Triton's wherever it can run.

    unsupported: says what about the inputs the kernels do not serve, or returns an empty string.
    Raises ConfigError for an unknown name and KernelUnavailableError for "triton" where it cannot.
    """
    if kernel not in KERNELS:
        names = ", ".join(map(repr, KERNELS))
        raise ConfigError(f"unknown kernel {kernel!r}; valid names: {names}")
    # Interpreted kernels run on a CPU, but only where they were named explicitly.
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return "torch"
    reason = triton_launch.unavailable(device) or unsupported()
    if reason and kernel == "triton":
        raise KernelUnavailableError(
            f"kernel='triton' cannot run here: {reason}; use kernel='auto' or 'torch', which "
            "Inductor compiles"
        )
    return "torch" if reason else "triton"


def selection(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
    pivot_image_tokens: int,
    pivot_text_tokens: int,
    selector: str,
    kernel: str,
    queries: Tensor | None = None,
    quota: Sequence[int] | None = None,
    min_tokens: int = 1,
    frames: bool = False,
    tower_attention: Tensor | None = None,
    *,
    traced: bool = False,
) -> Tensor:
    pivots = {"pivot_image_tokens": pivot_image_tokens, "pivot_text_tokens": pivot_text_tokens}
    # The name may be followed by what identifies the result, for caches that hash the call.
    selector = selector.partition(" @ ")[0]
    validation.check_arguments(hidden, keys, vision_mask, valid_mask, queries, tower_attention)
    validation.check_counts(retain=retain, **pivots)
    validation.check_vision_tokens(vision_tokens, hidden)
    unsupported = functools.partial(_not_served, hidden, keys, selector, quota, pivots)
    if choose_kernel(kernel, hidden.device, unsupported) == "triton":
        kept, fits = triton_launch.select(
            hidden, keys, vision_mask, valid_mask, vision_tokens, retain, traced=traced, **pivots
        )
        keep_idx: Tensor = torch.ops.dartfx.require_rows(kept, fits, TEXT_LOST)
        return keep_idx
    plan = plan_batch(vision_mask, valid_mask, vision_tokens, retain)
    budget = torch.ops.dartfx.require_rows(plan.budget, plan.fits, TEXT_LOST)
    given: dict[str, Any] = {"queries": queries, "tower_attention": tower_attention}
    given.update(valid_mask=plan.text | vision_mask, most=_largest(plan, retain))
    quotas = None if quota is None else (quota, min_tokens, frames)
    optional = _optional_inputs(selector, given, bool(quotas))
    inputs = hidden, keys, vision_mask, plan.text_after, budget
    return keep_positions(plan, _kept(selector, inputs, pivots, optional, quotas))


def _not_served(
    hidden: Tensor,
    keys: Tensor,
    selector: str,
    quota: Sequence[int] | None,
    pivots: Mapping[str, int],
) -> str:
    """What about the inputs the kernels do not serve; empty where they do."""
    if quota is not None:
        return _NO_QUOTA
    return triton_launch.unsupported(hidden, keys, selector, **pivots)


def _kept(
    selector: str,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    pivots: Mapping[str, int],
    optional: Mapping[str, Any],
    quotas: tuple[Sequence[int], int, bool] | None,
) -> Tensor:
    """The vision tokens that a selector keeps, of each row or of each image, [B, S] bool."""
    if quotas is not None:
        of_images: Tensor = torch.ops.dartfx.select_spans(
            *(*inputs, optional.get("queries"), optional.get("valid_mask")),
            *(*pivots.values(), selector, *quotas),
            tower_attention=optional.get("tower_attention"),
        )
        return of_images
    kept = registry.get_selector(selector)(*inputs, **pivots, **optional)
    if registry.is_exact(selector):
        return kept
    return checked(kept, inputs[2], inputs[4], f"selector {selector!r}")


def _largest(plan: BatchPlan, retain: Size) -> Size:
    """What no row's budget exceeds: R, but where other rows may hold more vision tokens."""
    alone = statically_known_true(plan.budget.shape[0] == 1)
    return smaller(retain, plan.length) if alone else plan.length


def _optional_inputs(selector: str, given: Mapping[str, Any], spans: bool) -> dict[str, Any]:
    """Those of the given inputs that the selector requests by name."""
    requested = registry.optional_inputs(selector)
    if "before" in requested and not spans:
        raise validation.fail("quota", f"must be 'frame' or 'image' for selector {selector!r}")
    for name in requested:
        if given.get(name, name) is None:
            raise validation.fail(name, f"must be given: selector {selector!r} requests them")
    return {name: given[name] for name in requested if name in given}


def checked(kept: Tensor, vision_mask: Tensor, budget: Tensor, who: str) -> Tensor:
    """``kept`` [B, S] bool, once it is known to hold budget[b] vision tokens in every row b.

    Raises SelectionError naming ``who`` made it, as an operator does.
    """
    if kept.dtype != torch.bool or kept.shape != vision_mask.shape:
        raise SelectionError(
            f"dartfx.select_tokens: {who} returned {kept.dtype} of shape "
            f"{tuple(kept.shape)}; it must return bool of shape {tuple(vision_mask.shape)}"
        )
    met = (kept.sum(1) == budget) & ~(kept & ~vision_mask).any(1)
    # Where the check is an assertion on the device, later kernels may run before it is noticed.
    kept = enforce_budget(kept, vision_mask, budget)
    message = _WRONG_COUNT.format(who=who)
    checked: Tensor = torch.ops.dartfx.require_rows(kept, met, message)
    return checked


_select_tokens = custom_op(
    "dartfx::select_tokens",
    selection,
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor keys, Tensor vision_mask, Tensor? valid_mask, "
        "SymInt vision_tokens, SymInt retain, int pivot_image_tokens, int pivot_text_tokens, "
        "str selector, str kernel, Tensor? queries=None, int[]? quota=None, int min_tokens=1, "
        "bool frames=False, Tensor? tower_attention=None) "
        "-> Tensor"
    ),
)


@_select_tokens.register_fake
def _select_tokens_fake(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    valid_mask: Tensor | None,
    vision_tokens: Size,
    retain: Size,
    *others: int | str | Tensor | Sequence[int] | None,
) -> Tensor:
    length = kept_length(hidden.shape[1], vision_tokens, retain)
    return hidden.new_empty((hidden.shape[0], length), dtype=torch.int64)


def _decompose(
    mode: Any,
    op: Any,
    types: Sequence[type],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Tensor:
    with mode:
        return selection(*args, **kwargs, traced=True)


# Without it the selection stays one call in what Inductor makes of the graph.
if (_tracing := compat.find("FunctionalTensorMode")) is not None:
    _select_tokens.register_torch_dispatch(_tracing, _decompose)
