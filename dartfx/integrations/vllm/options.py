"""dartfx's options in vLLM's ``--additional-config``, and how many tokens they drop."""

from __future__ import annotations

from collections.abc import Mapping

from dartfx.config import DartConfig
from dartfx.config.validators import choices, describe
from dartfx.errors import ConfigError
from dartfx.selection.registry import is_random, optional_inputs, uses_key_norms_only

__all__ = [
    "KEY",
    "LOGITS_PROCESSORS",
    "OPTIONS",
    "SCHEDULER",
    "check_ranks",
    "dropped",
    "read",
    "summary",
]

KEY = "dartfx"

# The format of class names in vLLM's options.
SCHEDULER = "dartfx.integrations.vllm.memory.PrunedScheduler"
LOGITS_PROCESSORS = {
    "V1": "dartfx.integrations.vllm.runners.v1:Requests",
    "V2": "dartfx.integrations.vllm.runners.v2:Requests",
}

# The others concern graphs that dartfx compiles; here vLLM compiles.
OPTIONS = (
    "kernel",
    "layer",
    "pivot_image_tokens",
    "pivot_media_tokens",
    "pivot_text_tokens",
    "reduction_ratio",
    "retain_tokens",
    "selector",
)


def read(additional_config: object) -> DartConfig | None:
    """Parse and check the options under ``"dartfx"``; None if that key is absent or null.

    Raises ConfigError for an unknown option, an invalid value, or what cannot be served in vLLM.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{KEY} in additional_config must be a dict, got {describe(given)}")
    for name in given:
        if name not in OPTIONS:
            raise ConfigError(
                f"option {name!r} of {KEY} in additional_config is not one that works in vLLM; "
                f"{choices(name, OPTIONS)}"
            )
    config = DartConfig.from_options(given)
    if isinstance(config.layer, tuple):
        raise ConfigError(f"layer={list(config.layer)} has several stages; in vLLM give one layer")
    if config.layer == 0:
        raise ConfigError("layer=0 prunes before the first decoder layer; in vLLM give 1 or more")
    if "queries" in optional_inputs(config.selector):
        raise ConfigError(
            f"selector={config.selector!r} needs attention queries, which are not available in "
            "vLLM; choose another, such as 'dart'"
        )
    if "tower_attention" in optional_inputs(config.selector):
        raise ConfigError(
            f"selector={config.selector!r} needs the vision tower's attention, which vLLM computes "
            "apart from the decoder; choose another, such as 'dart'"
        )
    return config


def check_ranks(config: DartConfig, ranks: int) -> None:
    """Raise ConfigError for a selector that could keep different tokens on different ranks."""
    if ranks == 1:
        return
    if is_random(config.selector) or not uses_key_norms_only(config.selector):
        raise ConfigError(
            f"selector={config.selector!r} may read keys head by head or draw random numbers, so "
            f"{ranks} tensor-parallel ranks could keep different tokens; choose a built-in one, "
            "such as 'dart', or serve with --tensor-parallel-size 1"
        )


def dropped(config: DartConfig, vision_tokens: int) -> int:
    """How many of a prompt's vision tokens the layers behind the cut never see."""
    return max(vision_tokens - config.retain_for(vision_tokens), 0) if vision_tokens else 0


def summary(config: DartConfig) -> str:
    """Describe what is kept, for the log."""
    if config.retain_tokens is not None:
        kept = f"at most {config.retain_tokens} vision tokens"
    else:
        kept = f"{1 - float(str(config.reduction_ratio)):.1%} of the vision tokens"
    return f"{kept} of each prompt (selector {config.selector})"
