"""Failures of a compiled call: which of them the cut caused, and how they are reported."""

from __future__ import annotations

import os

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from dartfx import compat
from dartfx.errors import DartfxError
from dartfx.passes.refusal import Declined
from dartfx.runtime import vision_mask
from dartfx.runtime.kept_positions import PositionsAfterCut

__all__ = [
    "failure_after_cut",
    "inner",
    "not_one_graph",
    "nothing_merged",
    "past_limit",
    "raise_ours",
    "runs_eagerly",
]

_MAP_POSITIONS = (
    "that step outside of the compiled model, with dartfx.kept_positions(output), which is the "
    "prompt's position of every token that is left"
)


def not_one_graph() -> tuple[type[Exception], ...]:
    """What dynamo raises when fullgraph=True fails; some are the tracer's, which it lets out."""
    return GuardOnDataDependentSymNode, *compat.errors(
        "TorchDynamoException", "DataDependentOutputException", "DynamicOutputShapeException"
    )


def inner(failed: Exception) -> Exception | None:
    """What a backend raised, which dynamo wraps."""
    return getattr(failed, "inner_exception", None)


def raise_ours(failed: Exception) -> None:
    """Raise an error of dartfx out of dynamo's wrapping."""
    if isinstance(error := inner(failed), DartfxError):
        raise error from failed


def failure_after_cut(error: Exception) -> Declined:
    """A refusal for code between graphs, or in a later one, that needs the prompt's length."""
    if isinstance(error, PositionsAfterCut):
        return Declined(str(error), advice=_MAP_POSITIONS)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Dynamo wraps the operator's message and appends where the user's code called it.
    message = next((line for line in lines if " got " in line), lines[0] if lines else repr(error))
    files = [line for line in lines if line.startswith("File ")]
    return Declined(
        "the call has several graphs, one was pruned, and the code after it failed on the shorter "
        f"sequence: {message.rpartition(' got ')[2]}",
        where=files[-1] if files else "",
        advice="compute what failed (a loss, say) outside the model; where it is around a model "
        'inside this one, dartfx.compile(model.base_model, logits="full") instead of the whole; or '
        "give inputs_embeds that you merged, within dartfx.vision_tokens(mask), so that one graph "
        "holds the whole call",
    )


def nothing_merged(brought: str, graphs: int) -> Declined:
    """A refusal for a call with vision inputs none of whose ``graphs`` merges them."""
    if not graphs:
        return Declined(
            f"the call was given {brought}, but torch ran the model without any compiled graph, as "
            "it does past torch._dynamo.config.recompile_limit, under torch.compiler.set_stance, "
            "and inside another dispatch mode",
            advice="a higher torch._dynamo.config.recompile_limit or accumulated_recompile_limit, "
            "torch.compiler.reset(), or the default stance",
        )
    return Declined(
        f"the call was given {brought}, but none of its {graphs} graphs merges vision features "
        "into a decoder's embeddings: that happens in code which dynamo leaves to Python, or they "
        "enter by an encoder or by cross-attention",
        advice=_how_to_give_a_mask(),
    )


def _how_to_give_a_mask() -> str:
    if (given := vision_mask.given()) is not None:
        shape = list(given.mask.shape)
        return f"a mask that fits the prompt; dartfx.vision_tokens was given one of shape {shape}"
    if vision_mask.given_elsewhere():
        return (
            "dartfx.vision_tokens(mask) inside the function that the thread runs: it was entered "
            "in another thread, and a new thread does not see it"
        )
    return (
        "dartfx.vision_tokens(mask) around the call, if the decoder's own sequence holds vision "
        "tokens"
    )


def past_limit(brought: str) -> Declined:
    """A refusal for a call past dynamo's limit of compilations."""
    return Declined(
        f"the call was given {brought}, and dynamo has compiled this model as often as "
        "torch._dynamo.config.recompile_limit or accumulated_recompile_limit allows",
        advice="a higher torch._dynamo.config.recompile_limit, dartfx.compile(..., dynamic=True), "
        'or torch.compiler.reset(); TORCH_LOGS="recompiles" says what differed between calls',
    )


def runs_eagerly() -> Declined | None:
    """A refusal where torch would not compile a call at present."""
    settings = compat.find("dynamo_config")
    if getattr(settings, "disable", False) or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return Declined(
            "torch.compile is disabled (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or "
            "torch._dynamo.config.disable), so the model runs as it is"
        )
    in_mode = compat.find("is_in_any_mode_without_ignore_compile_internals")
    if in_mode is not None and in_mode():
        return Declined("dynamo compiles nothing inside a dispatch mode (a FLOP counter, say)")
    return None
